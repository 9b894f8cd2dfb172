"""Algorithms that look at the ways that some inner steps go."""
