"""Graders: compare a final answer with the gold answer of a problem, each in a file of its own."""
