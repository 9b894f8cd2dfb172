"""Common machinery of all algorithms: wrapped optimizer, state, a step's batch, backward."""
