"""Tables and plots, from run records alone."""
