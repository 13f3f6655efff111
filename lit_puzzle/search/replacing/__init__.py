"""One block of the parent replaced at a time, and what that does to the end of it."""
