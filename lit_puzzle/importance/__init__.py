"""Which experts of a parent matter: scores of one pass, and their file."""
