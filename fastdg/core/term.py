"""Base of the wrappers that add a penalty to every sample's loss."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.variance_encoder import BIAS, VarianceEncoder
from .base_state import own_part, with_part
from .batch import PenaltyOutput
from .declared_state import PerParameter
from .optimizer import DomainOptimizer


class Term(DomainOptimizer):
    r"""Base of wrappers that add a term :math:`r_i` to each sample's loss:
    ``objective = mean of the losses + mean of the terms``.

    Alone it runs one plain backward of this objective. Any algorithm, and any other term, may go
    around it (``fastdg.Fishr(fastdg.MIRO(optimizer, model))``). There is still one backward: the
    outermost wrapper collects :math:`r_i` of every term in the chain. Algorithms that combine the
    domains' gradients use the losses with their terms; algorithms with a penalty use the losses
    alone, and the terms' mean joins the objective.

    A term implements `sample_penalty`. The user passes its keyword arguments to `backward` of the
    outermost wrapper, by the same names; an argument without a default is required.
    """

    role = "term"
    looks_at_samples = False

    @abstractmethod
    def sample_penalty(
        self, losses: Tensor, *args: Any, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the penalty of each sample and statistics.

        The penalty ``[N]`` is multiplied by its weight and has a graph; statistics are means over
        the samples, detached.
        """

    def weighted(
        self, parts: Mapping[str, tuple[float, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of weight times values ``[N]``, and the mean of the values by name.

        Values of weight 0 are skipped, as 0 * inf is NaN.
        """
        found = [weight * values for weight, values in parts.values() if weight > 0]
        (_, first), *_ = parts.values()
        total = sum(found[1:], found[0]) if found else torch.zeros_like(first)
        if not total.requires_grad:  # all its inputs are frozen, but a backward starts here
            total.requires_grad_()
        names = {f"{self.prefix}_{key}": values for key, (_, values) in parts.items()}
        return total, {name: values.detach().mean() for name, values in names.items()}

    def modules(self) -> Sequence[nn.Module]:
        """Return the modules that own the term's parameters."""
        return ()

    def inputs(self) -> dict[str, bool]:
        """Return the further inputs of `backward`: name -> whether this term requires it."""
        kinds = inspect.Parameter.KEYWORD_ONLY
        parameters = inspect.signature(self.sample_penalty).parameters.values()
        return {p.name: p.default is p.empty for p in parameters if p.kind is kinds}

    def added(self, losses: Tensor, inputs: Mapping[str, Any]) -> PenaltyOutput:
        """Compute the penalties of ``losses``, and check them."""
        takes, name = self.inputs(), type(self).__name__
        missing = [key for key, needed in takes.items() if needed and inputs.get(key) is None]
        if missing:
            more = ", ".join(f"{key}={key}" for key in missing)
            raise TypeError(
                f"{missing[0]}: {name} needs {' and '.join(missing)}, got none. Call "
                f"opt.backward(losses, domains, {more})."
            )
        own = {key: value for key, value in inputs.items() if key in takes}
        values, statistics = self.sample_penalty(losses, **own)
        if values.shape != losses.shape:
            raise ValueError(
                f"losses: {name} saw {len(values)} samples in the forward, got {len(losses)} "
                "losses. Pass one loss for each sample of the forward."
            )
        return PenaltyOutput(values, statistics)


class VarianceTerm(Term):
    """A term with trained variances, one for each channel of some layers.

    The wrapped optimizer trains them in an added group, with the settings of the first group and
    ``lr_multiplier`` times its learning rate.

    The first forward gives them their sizes. A state may be loaded before, so they are saved as
    state too.
    """

    lr_multiplier: float

    bias = PerParameter(
        "bias",
        "variances",
        begin=lambda opt: {b: b.detach() for b in opt.biases.values() if b.numel()},
        way="run the model once, in training mode, before loading",
    )

    def _start(self) -> None:
        self._encoders: dict[str, VarianceEncoder] = {}

    @property
    def biases(self) -> dict[str, Tensor]:
        """Layer -> parameter of its encoder; empty before the first forward."""
        return {name: encoder.bias for name, encoder in self._encoders.items()}

    def modules(self) -> list[nn.Module]:
        return list(self._encoders.values())

    def _join(self, marks: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        """Take the parameters of the group with the entries ``marks``, or add such a group.

        A new group also gets the entries ``more``.
        """
        marks = {f"{self.prefix}_{key}": value for key, value in marks.items()}
        name, first, biases = type(self).__name__, self.param_groups[0], self.biases
        for group in self.param_groups:
            if all(group.get(key) == value for key, value in marks.items()):
                for encoder, bias in zip(self._encoders.values(), group["params"], strict=True):
                    encoder.bias = bias
                return
        if any("initial_lr" in group for group in self.param_groups):
            raise ValueError(
                "base: it has a scheduler already, which would miss the parameter group that "
                f"{name} adds. Create the scheduler after the wrapper."
            )
        group = {key: value for key, value in first.items() if key in self.defaults}
        if "lr" in first:
            group["lr"] = first["lr"] * self.lr_multiplier
        named = [(f"{self.prefix}.{key}", bias) for key, bias in biases.items()]
        params = named if "param_names" in first else [bias for _, bias in named]
        own = {f"{self.prefix}_{key}": value for key, value in more.items()}
        self.base.add_param_group({**group, "params": params, **marks, **own})

    def _own_group(self) -> int:
        """Return the index of the variances' group."""
        own = {id(bias) for bias in self.biases.values()}
        return next(i for i, g in enumerate(self.param_groups) if own & set(map(id, g["params"])))

    def _known(self) -> dict[Tensor, str]:
        own = {bias: f"{self.prefix}.{name}" for name, bias in self.biases.items()}
        return {**super()._known(), **own}

    def added(self, losses: Tensor, inputs: Mapping[str, Any]) -> PenaltyOutput:
        self._remember()
        return super().added(losses, inputs)

    def _remember(self) -> None:
        super()._remember()
        for bias in self.biases.values():
            if bias.numel() and bias not in self.bias:
                self.bias[bias] = bias.detach()

    def _split_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        own = self._own_group()
        part = own_part(state_dict, self.param_groups)
        groups = list(part["param_groups"])
        if len(groups) == len(self.param_groups) - 1:  # saved by the optimizer without the term
            ids = [f"{self.prefix}.{name}" for name in self.biases]
            groups.insert(own, {**self.param_groups[own], "params": ids})
            state_dict = with_part(state_dict, {**part, "param_groups": groups})
        return super()._split_state(state_dict)

    def _finish_load(self) -> None:
        super()._finish_load()
        loaded = dict(self.bias)
        self.bias.clear()
        for bias in self.biases.values():
            if bias in loaded:
                bias.data = loaded[bias].to(bias.dtype)
            elif bias.numel():
                bias.data = torch.full_like(bias, BIAS)
        self._remember()

    def _follow(self) -> None:
        super()._follow()
        self.bias.clear()  # in a copy, state and parameters would not share memory
        self._remember()
