"""The search: budgets as limits, the program and its solver, the plan and its report."""
