"""SAM and its relatives: gradients at several weights."""
