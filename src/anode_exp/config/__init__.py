"""The configuration, without torch: types, checks, and composing a command line."""
