"""Solvers of the search: choice problems, the exact solver on HiGHS, baselines, and explanations of infeasibility."""
