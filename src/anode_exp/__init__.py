"""Memory-efficient training of neural-ODE image classifiers."""
