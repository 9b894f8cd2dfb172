"""Short training scripts, each to be run as ``python -m fastdg.examples.NAME``."""
