"""Importance scores of a parent's experts: computed in one pass, combined, kept in a file."""
