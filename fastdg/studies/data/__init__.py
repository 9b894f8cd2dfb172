"""Real data for experiments: scikit-learn's digits, and MNIST and PACS from the user's disk."""
