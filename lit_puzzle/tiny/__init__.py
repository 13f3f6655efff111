"""A gpt-oss of two million parameters that reasons: its environments, its tokenizer and its training from scratch."""
