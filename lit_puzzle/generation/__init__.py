"""Completions sampled from a model, by transformers or by vLLM."""
