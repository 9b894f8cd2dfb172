"""Algorithms whose iteration is a loop of steps on one domain after the other."""
