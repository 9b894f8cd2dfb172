"""Per-sample gradients from the autograd graph: no module is hooked, no operation is required.

`graph` walks the graph, `provenance` finds which sample each entry of an output gradient belongs
to, `plan` finds the boundaries of each parameter, `rules` support known operations,
`by_autograd` supports all others, and `engine` runs the backward that feeds them.
"""
