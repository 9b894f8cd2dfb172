"""Layer rules: from a layer's input and output gradient to its parameters' per-sample gradients.

A rule is a function ``rule(module, inputs, delta) -> dict[str, Factor]``. ``inputs`` are the
positional arguments of the call, ``delta`` is the gradient of the summed losses at the output, and
the result has a `Factor` for each of the module's own parameters. Register one with
`register_rule`; whatever has none is served by `generic`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

from ..factors import Factor

Rule = Callable[[Any, tuple[Any, ...], Tensor], dict[str, Factor]]
RULES: dict[type[nn.Module], Rule] = {}
R = TypeVar("R", bound=Rule)
LAYER = {"weight", "bias"}  # the parameters of every layer with a rule


def register_rule(*modules: type[nn.Module]) -> Callable[[R], R]:
    """Register how a layer's per-sample gradients are made (decorator).

    The rule serves exactly the classes named, and subclasses that inherit their ``forward``
    unchanged. Without one a module is run again for its gradients, which for a parameter of the
    root module's own (a ViT's ``pos_embed``) is the whole network: give such a parameter a small
    module.

    Example:
        >>> @fastdg.register_rule(Scale)                # y = x * module.gain, x (N, C)
        ... def scale(module, inputs, delta):
        ...     return {"gain": fastdg.Dense(delta * inputs[0])}
    """
    for module in modules:
        if not (isinstance(module, type) and issubclass(module, nn.Module)):
            raise TypeError(f"modules: expected nn.Module classes, got {module!r}")

    def register(rule: R) -> R:
        for module in modules:
            RULES[module] = rule
        _rule_of_class.cache_clear()
        return rule

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """The rule that serves ``module``, or None if that is the generic one."""
    rule, torchs = _rule_of_class(type(module))  # type: ignore[arg-type]  # classes are hashable
    if rule is None or "parametrizations" in module._modules:
        return None
    # A torch layer that was given further parameters (old-style weight norm) is no longer that
    # layer; what a rule of the user's own serves is up to the user.
    return None if torchs and not module._parameters.keys() <= LAYER else rule


@cache
def _rule_of_class(module: type[nn.Module]) -> tuple[Rule | None, bool]:
    """The rule for that class, and whether it is one for a layer of torch."""
    for cls in module.__mro__:
        if (rule := RULES.get(cls)) is not None:
            served = getattr(cls, "forward", None) is module.forward
            return rule if served else None, cls.__module__.startswith("torch.nn")
    return None, False


def spans_samples(module: nn.Module) -> bool:
    """Whether the layer mixes the samples of a batch, so that per-sample gradients do not exist."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False
    return module.training or module.running_mean is None


from . import conv, embedding, linear, norm  # noqa: E402, F401  (they register themselves)
