"""Real data for experiments: what is bundled with scikit-learn, and MNIST where the user has it."""
