"""The search in numbers: limits and options, programs for HiGHS, baselines, and why there is no plan."""
