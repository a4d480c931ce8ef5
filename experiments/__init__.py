"""The experiment: every method on the same rows, several seeds, one table."""
