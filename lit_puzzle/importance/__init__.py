"""Importance scores of a parent's experts: computed in one pass, kept in a file."""
