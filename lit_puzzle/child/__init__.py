"""A child as a folder: from a parent and a plan, or from a child and its trained weights."""
