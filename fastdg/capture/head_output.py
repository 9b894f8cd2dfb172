"""The logits that losses were made from, and the derivatives of the losses by a factor on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..domains import tracing
from ..dtypes import to_statistics_dtype
from ..gradients.heads import Head, crossed_output, last_output
from ..gradients.scale import backward_scale
from ..gradients.tape import Tape, TrackedForward
from ..statistics.check import TOLERANCE
from ..warn import warn_user


class HeadOutputs:
    """Finds the logits of losses; remembers for which layers the losses were seen to be theirs."""

    def __init__(self) -> None:
        self.checked: set[tuple[str, ...]] = set()

    def of(
        self, losses: Tensor, logits: Tensor | None, tape: Tape, check: bool
    ) -> tuple[HeadOutput, TrackedForward | None]:
        """The logits of ``losses``: as the user gave them, or the input of the cross-entropy,
        or else the result of the last layer with parameters, for which the graph is resolved.

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
        resolved = tape.resolve(losses, warn=False)  # no gradient of a parameter is asked for
        assert resolved.forward is not None
        names = tuple(resolved.forward.names)
        return HeadOutput(losses, None, last_output(resolved.forward), checked, names), resolved


@dataclass
class HeadOutput:
    """The logits of the losses of one micro-batch.

    Attributes:
        losses: ``[N]``, with their graph.
        given: logits that the user gave.
        head: or a node whose result they are.
        checked: names of layers for which no check is needed any more; None: none is wanted.
        names: of the parameters of the head.
    """

    losses: Tensor
    given: Tensor | None
    head: Head | None
    checked: set[tuple[str, ...]] | None
    names: tuple[str, ...] = ()

    def products(self, scale: Tensor | None, create_graph: bool) -> Tensor:
        """The derivative of each sample's loss by a factor on its logits, ``[N]``.

        Args:
            scale: the factor of a GradScaler.
            create_graph: whether it is differentiable.

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
        """The gradient of the weighted losses at the logits, and these; the graph is kept."""
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
                "logits: losses do not depend on them; pass the logits that losses were made from"
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
                    f"losses: IRM takes the result of the last layer, {list(logits.shape)}, for "
                    "the logits, but the losses are not the cross-entropy of it (are they scaled "
                    "after the head?). Pass the logits that the losses are made from: "
                    "opt.backward(losses, domains, logits=logits)"
                )
            self.checked.add(self.names)
            return
        generator = torch.Generator("cpu").manual_seed(0)  # the user's stream is not touched
        weights = (0.5 + torch.rand(len(self.losses), generator=generator)).to(self.losses)
        weighted = self._deltas(False, before * weights)[0].flatten()
        expected = (delta.reshape(len(weights), -1) * weights.unsqueeze(1).to(delta)).flatten()
        tolerance = max(TOLERANCE.get(x.dtype, 1e-4) for x in (delta, self.losses))
        if (weighted - expected).norm() > tolerance * expected.norm():
            raise RuntimeError(
                "losses: a sample's loss depends on other rows of the logits than its own (a loss "
                "over pairs, or the sample is not the first dimension), so a factor on one "
                "sample's logits cannot be told from that on another's"
            )
        if len(weights) > 1 and 0 < float(expected.norm()) < float("inf"):
            self.checked.add(self.names)


def check_logits(logits: Any, losses: Tensor) -> None:
    """Raise unless ``logits`` is a tensor with a graph and a row for each of ``losses``."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor (N, *), got {type(logits).__name__}")
    if logits.shape[:1] != losses.shape:
        raise ValueError(
            f"logits: expected a row for each of the {len(losses)} losses, got shape "
            f"{tuple(logits.shape)}"
        )
    if not logits.requires_grad:
        raise ValueError("logits: they have no graph; pass the very tensor losses were made from")


def crossed(losses: Tensor, logits: Tensor, delta: Tensor) -> bool:
    r"""Whether the losses can be the cross-entropy of the logits, with any weight and label a
    sample: :math:`\ell = -w\log p_y` where :math:`\partial\ell/\partial z = w(p - e_y)`.

    Args:
        losses: ``[N]``.
        logits: ``[N, C]``; ``[N]`` and ``[N, 1]`` are of two classes. Of more dimensions nothing is
            known.
        delta: the gradients of the losses at the logits.
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
    # Near 1 nothing is left of p_y in half precision
    told = (rest.squeeze(1) > 0.1) & expected.isfinite() & losses.isfinite()
    off = (losses.double() - expected).abs() > 0.1 * expected.abs() + 1e-6
    return not (told & off).any()
