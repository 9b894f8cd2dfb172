"""What algorithms ask for: per-domain gradients, moments, Gram matrices, per-sample norms."""
