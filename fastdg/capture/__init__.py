"""What a forward leaves for a backward: notes on its graph, and feature maps of named modules."""
