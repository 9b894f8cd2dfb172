"""One paper a file: each algorithm is a wrapper around any ``torch.optim`` optimizer."""
