"""Advice that several messages give."""

# A wrapper that takes no params= puts its own way out in this place of a message
LEAVE_OUT = "leave these parameters out (params='head', or a list of the others), or freeze them"
NAMES = (
    "For names in place of param_groups[...] pass model=model, or make the optimizer of "
    "model.named_parameters()"
)
