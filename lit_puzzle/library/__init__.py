"""The blocks that each layer of a parent could become."""
