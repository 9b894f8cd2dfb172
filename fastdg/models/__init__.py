"""Networks that algorithms bring along."""
