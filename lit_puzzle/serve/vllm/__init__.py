"""vLLM: the plugin for children, and checks that vLLM serves a folder as transformers computes it."""
