"""The gpt-oss models and what is done to their weights. Layout and safetensors headers are read without torch."""
