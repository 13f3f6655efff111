"""Completions sampled from a model: one interface, by transformers or by vLLM."""
