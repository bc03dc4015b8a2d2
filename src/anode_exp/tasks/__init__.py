"""What is learned: one file a task."""
