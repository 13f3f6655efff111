"""Serving: the exported folder; FP8 KV scales; vLLM."""
