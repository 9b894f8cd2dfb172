"""What all algorithms share: the wrapped optimizer, its state, one step's batch, one backward."""
