"""Serving: FP8 KV scales, the exported folder, vLLM."""
