"""Runs recipes of stages in their order, as processes, into one folder, and says beforehand what that costs."""
