"""Evaluation: accuracy and generated length of a checkpoint, per reasoning effort and environment."""
