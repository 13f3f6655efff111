"""Distillation: the losses, and a whole child that learns from its parent."""
