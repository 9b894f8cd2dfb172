"""Algorithms that make one gradient of the domains' own: what they share."""
