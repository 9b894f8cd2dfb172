"""Objectives of the distribution of features in each domain."""
