"""The verbs of the command line, one file each: what it takes, its help, and what it prints."""
