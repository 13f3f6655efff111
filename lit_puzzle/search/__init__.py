"""Search: from a parent and the importance of its experts to a plan, and from the plan to a child."""
