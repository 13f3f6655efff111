"""vLLM: the plugin, and the checks that a folder is served as transformers computes it."""
