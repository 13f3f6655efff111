"""Serving: the exported folder, a plugin for vLLM, and the check of both."""
