"""One room per algorithm; each is a wrapper around any ``torch.optim`` optimizer."""
