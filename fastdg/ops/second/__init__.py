"""Ops for derivatives of backwards: of activations and of attention."""
