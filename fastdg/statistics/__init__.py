"""The statistics: per-domain gradients, moments, Gram matrices, per-sample norms."""
