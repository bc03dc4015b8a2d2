"""Writing and reading the records of runs."""
