"""The search for a plan: quality losses and costs of candidates, budgets as constraints, and their solvers."""
