"""Self-supervised learning: no domains, so no wrapper of these knows any."""
