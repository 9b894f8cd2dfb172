"""Objectives of the samples' losses and logits."""
