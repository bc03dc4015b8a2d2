"""A byte budget for training: measuring checkpoint policies, and planning with them."""
