"""Ownership: the sample of each entry of a gradient."""
