"""Averages of the weights over steps."""
