"""Nash-MTL: the Nash bargaining solution between the domains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.hyper import check_norm, check_steps, check_switch
from .fair_grad import fair
from .gram import Gram, GramWeighting


class NashMTL(GramWeighting):
    r"""Multi-task learning as a bargaining game: the step with the largest product of all domains'
    progress.

    .. math:: K w = 1 / w, \qquad w > 0

    The combination has the length :math:`\sqrt{D}`, whatever that of the gradients. A gradient of
    zeros has weight 0 and is not counted. Where a convex combination is zero there is no
    agreement, and the weights, as large as the dtype's rounding allows, have a combination near
    zero.

    Args:
        update_every: solve in every so many calls, and return the last weights in between. They
            are state; the first call solves. Inside `SAM` each gradient of a step is a call.
        frobenius: divide K by its Frobenius norm first, as the authors' code and TorchJD do: the
            weights are then :math:`\|K\|_F^{1/2}` times the paper's.
        max_norm: shorten a longer combination to this length, as the authors' code does to 1; None:
            never.

    Solved as in `FairGrad`, of which it is ``alpha=1``, to rounding; the authors' code makes 20
    steps of a convex-concave procedure with cvxpy.

    Reference:
        Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: Multi-Task Learning as a
        Bargaining Game, ICML 2022, arXiv:2202.01017.
    """

    def __init__(
        self, update_every: int = 1, frobenius: bool = False, max_norm: float | None = None
    ) -> None:
        check_steps("update_every", update_every)
        check_switch("frobenius", frobenius)
        check_norm("max_norm", max_norm)
        self.update_every, self.frobenius, self.max_norm = update_every, frobenius, max_norm
        self.calls = 0
        self.last: Tensor | None = None

    @property
    def keeps_state(self) -> bool:  # type: ignore[override]
        """Whether a call reads the weights of another one."""
        return self.update_every > 1

    def weights(self, gram: Gram) -> Tensor:
        weights = self._bargain(gram)
        if self.max_norm is not None:
            length = (gram.square(weights) * gram.scale).sqrt()
            weights = weights * (self.max_norm / length.clamp(min=1e-300)).clamp(max=1)
        return weights

    def _bargain(self, gram: Gram) -> Tensor:
        last = self.last
        if self.update_every > 1:  # else no call is told from another one
            self.calls += 1
            if last is not None and len(last) == len(gram) and self.calls <= self.update_every:
                return last.to(gram.products)
            self.calls = 1
        weights = fair(gram, 1.0)
        if self.frobenius:
            weights = weights * torch.linalg.matrix_norm(gram.products).sqrt()
        else:
            weights = weights / gram.scale.sqrt()
        if self.update_every > 1:
            if last is not None and len(last) == len(gram):
                self.last = weights.where(gram.finite, last.to(weights))
            else:
                self.last = weights
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The last weights, and the calls since they were solved for."""
        return {"calls": self.calls, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of another one."""
        self.calls, self.last = state["calls"], state["last"]
