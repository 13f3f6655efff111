"""A plan and a parent become a folder; trained weights become a folder."""
