"""The logits of losses, and the derivatives of the losses by a factor on the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import has_graph
from ..domains import tracing
from ..dtypes import to_statistics_dtype
from ..gradients.heads import Head, crossed_output, last_output
from ..gradients.scale import backward_scale
from ..gradients.tape import Tape, TrackedForward
from ..statistics.check import TOLERANCE
from ..warn import warn_user


class HeadOutputs:
    """Finds the logits of losses, and remembers the layers whose outputs are checked."""

    def __init__(self) -> None:
        self.checked: set[tuple[str, ...]] = set()

    def of(
        self, losses: Tensor, logits: Tensor | None, tape: Tape, check: bool
    ) -> tuple[HeadOutput, TrackedForward | None]:
        """Find the logits of ``losses``.

        They are the user's, else the input of the cross-entropy, else the output of the last layer
        with parameters, which the graph shows.

        Raises:
            TypeError, ValueError: ``logits`` cannot be the logits of these losses.
        """
        checked = self.checked if check else None
        if logits is not None:
            check_logits(logits, losses)
            return HeadOutput(losses, logits, None, checked), None
        head = crossed_output(losses)
        if head is not None:
            return HeadOutput(losses, None, head, None), None  # they are its cross-entropy
        tracked = tape.resolve(losses, warn=False)  # no gradient of a parameter is asked for
        assert tracked.forward is not None
        names = tuple(tracked.forward.names)
        return HeadOutput(losses, None, last_output(tracked.forward), checked, names), tracked


@dataclass
class HeadOutput:
    """The logits of the losses of one micro-batch.

    Attributes:
        losses: ``[N]``, with their graph.
        given: logits from the user.
        head: node whose result the logits are, if the user gave none.
        checked: names of parameters of checked heads; None: no check is wanted.
        names: names of the parameters of the head.
    """

    losses: Tensor
    given: Tensor | None
    head: Head | None
    checked: set[tuple[str, ...]] | None
    names: tuple[str, ...] = ()

    def products(self, scale: Tensor | None, create_graph: bool) -> Tensor:
        """Differentiate each sample's loss by a factor on its logits ``[N]``.

        Args:
            scale: loss scale of a GradScaler.
            create_graph: make the result differentiable.

        Raises:
            RuntimeError: a loss depends on logits of other samples.
        """
        rows = len(self.losses), -1
        grad_scale = backward_scale(self.losses, scale)
        weights = torch.ones_like(self.losses)
        if grad_scale is not None:
            weights *= grad_scale
        delta, logits = self._deltas(create_graph, weights)
        with torch.set_grad_enabled(create_graph):
            self._check(delta, logits, weights)
            products = to_statistics_dtype(delta) * to_statistics_dtype(logits)
            products = products.reshape(rows).sum(1)
            return products if grad_scale is None else products / grad_scale

    def _deltas(self, create_graph: bool, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of the weighted losses by the logits, and the logits."""
        at: Any = self.head.edge if self.head is not None else self.given
        (delta,) = torch.autograd.grad(
            self.losses,
            [at],
            weights,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
        if delta is None:
            raise ValueError(
                "logits: the losses do not depend on them. Pass the logits from which you compute "
                "the losses."
            )
        if self.head is not None:
            return self.head.rows(delta), self.head.rows(self.head.value)
        assert self.given is not None
        return delta, self.given

    @torch.no_grad()
    def _check(self, delta: Tensor, logits: Tensor, before: Tensor) -> None:
        if self.checked is None or self.names in self.checked or tracing():
            return
        if self.head is not None:
            if not crossed(self.losses * before, logits, delta):
                warn_user(
                    f"losses: IRM takes the output of the last layer, {list(logits.shape)}, for "
                    "the logits, but the losses are not its cross-entropy (is the output scaled "
                    "after the layer?). Pass the logits from which you compute the losses: "
                    "opt.backward(losses, domains, logits=logits)."
                )
            self.checked.add(self.names)
            return
        generator = torch.Generator("cpu").manual_seed(0)  # leaves the user's generators alone
        weights = (0.5 + torch.rand(len(self.losses), generator=generator)).to(self.losses)
        weighted = self._deltas(False, before * weights)[0].flatten()
        expected = (delta.reshape(len(weights), -1) * weights.unsqueeze(1).to(delta)).flatten()
        tolerance = max(TOLERANCE.get(x.dtype, 1e-4) for x in (delta, self.losses))
        if (weighted - expected).norm() > tolerance * expected.norm():
            raise RuntimeError(
                "losses: a sample's loss depends on the logits of other samples (a loss over "
                "pairs, or the first dimension is not the sample), so it has no derivative by a "
                "factor on its own logits. Use a loss of single samples, and logits (N, *)."
            )
        if len(weights) > 1 and 0 < float(expected.norm()) < float("inf"):
            self.checked.add(self.names)


def check_logits(logits: Any, losses: Tensor) -> None:
    """Raise unless ``logits`` is a tensor with a graph and a row for each of ``losses``."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor (N, *), got {type(logits).__name__}.")
    if logits.shape[:1] != losses.shape:
        raise ValueError(
            f"logits: expected a row for each of the {len(losses)} losses, got shape "
            f"{tuple(logits.shape)}."
        )
    if not has_graph(logits):
        raise ValueError(
            "logits: they have no graph. Pass the same tensor from which you compute the losses."
        )


def crossed(losses: Tensor, logits: Tensor, delta: Tensor) -> bool:
    r"""Return whether the losses can be the cross-entropy of the logits, with any weight and label
    for each sample: :math:`\ell = -w\log p_y` where :math:`\partial\ell/\partial z = w(p - e_y)`.

    Args:
        losses: ``[N]``.
        logits: ``[N, C]``, or ``[N]`` and ``[N, 1]`` for two classes. With more dimensions the
            result is True.
        delta: gradients of the losses by the logits.
    """
    if logits[0].numel() == 1:
        z, g = (x.reshape(-1, 1).double() for x in (logits, delta))
        z, g = torch.cat([torch.zeros_like(z), z], 1), torch.cat([-g, g], 1)
    elif logits.dim() == 2:
        z, g = logits.double(), delta.double()
    else:
        return True
    logs = z.log_softmax(1)
    y = g.argmin(1, keepdim=True)
    rest = 1 - logs.gather(1, y).exp()
    weight = -g.gather(1, y) / rest
    expected = (-weight * logs.gather(1, y)).squeeze(1)
    # With p_y near 1, half precision has no digits of 1 - p_y
    told = (rest.squeeze(1) > 0.1) & expected.isfinite() & losses.isfinite()
    off = (losses.double() - expected).abs() > 0.1 * expected.abs() + 1e-6
    return not (told & off).any()
