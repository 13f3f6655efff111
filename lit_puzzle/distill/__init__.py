"""Distillation: blockwise local distillation, global distillation, and the parent's top-k logits on disk."""
