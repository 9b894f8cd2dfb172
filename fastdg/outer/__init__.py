"""Wrappers that go around algorithms: averages of the weights, and steps up to another point."""
