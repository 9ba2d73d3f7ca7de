"""What is searched: one file an experiment, plain Python, each defining SPACE."""
