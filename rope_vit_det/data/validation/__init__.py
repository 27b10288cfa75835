"""What is wrong with a dataset, before a run depends on it."""
