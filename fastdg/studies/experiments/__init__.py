"""Training runs that are compared, resumed and written down; no output of their own."""
