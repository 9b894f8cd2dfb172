"""Values of a forward for its backward: attached to the graph, and feature maps of modules."""
