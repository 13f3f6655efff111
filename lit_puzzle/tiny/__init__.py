"""A gpt-oss of two million parameters that reasons: its world, its tokenizer, its training from scratch."""
