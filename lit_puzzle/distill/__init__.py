"""Distillation: losses, blocks, a whole child, top-k logits."""
