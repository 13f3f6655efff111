"""Serving: the exported folder, and its use in vLLM."""
