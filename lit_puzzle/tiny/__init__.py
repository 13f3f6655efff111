"""A gpt-oss of two million parameters that really reasons: its world, its tokenizer and its training from scratch."""
