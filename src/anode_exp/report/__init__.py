"""Tables and plots, from run records only."""
