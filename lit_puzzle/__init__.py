"""lit_puzzle: the Puzzle method for Mixture-of-Experts reasoning models, on PyTorch Lightning."""

__version__ = "0.1.0"
