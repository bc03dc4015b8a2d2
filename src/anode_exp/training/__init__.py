"""One train step, one loop, and the records of a run."""
