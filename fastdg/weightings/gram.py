"""The Gram matrix of all weightings, checked and brought to one scale."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..domains import readable, tracing


@dataclass
class Gram:
    r"""A Gram matrix of D gradients in float64, its largest diagonal entry 1.

    Attributes:
        products: :math:`K_{de} = \langle g_d, g_e\rangle` over ``scale``, ``[D, D]``.
        scale: the largest :math:`|g_d|^2`, 0-dim; 1 if all gradients are zero.
        present: which gradients are not zero, ``[D]``.
        norms: :math:`|g_d|` over the root of ``scale``, 1 for a gradient of zeros, ``[D]``.
        cosines: inner products of the gradients at length 1, ``[D, D]``. The diagonal is 1
            throughout, so that a gradient of zeros is at right angles to all others.
        noise: uncertainty of the cosines.
        finite: whether the matrix was finite, 0-dim; if not, no state moves.
    """

    products: Tensor
    scale: Tensor
    present: Tensor
    norms: Tensor
    cosines: Tensor
    noise: float
    finite: Tensor

    @staticmethod
    def of(gram: Tensor, finite: Tensor) -> Gram:
        """The Gram matrix as it was given; the unit matrix in place of one that is not finite."""
        eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        products = gram.detach().double().where(finite, eye)
        largest = products.diagonal().amax()
        scale = largest.where(largest > 0, 1.0)
        products = products / scale
        present = products.diagonal() > 0
        norms = products.diagonal().where(present, 1.0).sqrt()
        cosines = products / norms / norms.unsqueeze(1)
        cosines = cosines.where(eye == 0, 1.0)
        noise = max(len(gram) * torch.finfo(gram.dtype).eps, 1e-13)
        return Gram(products, scale, present, norms, cosines, noise, finite)

    def __len__(self) -> int:
        return len(self.products)

    def firm(self) -> Tensor:
        """The cosines with `noise` on the diagonal, which keeps singular ones solvable."""
        return self.cosines + self.noise * self.eye()

    def eye(self) -> Tensor:
        """The unit matrix ``[D, D]``."""
        return torch.eye(len(self), dtype=self.products.dtype, device=self.products.device)

    def pseudo_inverse(self) -> Tensor:
        """The pseudo-inverse of the cosines; eigenvalues below `noise` are zeros."""
        values, vectors = torch.linalg.eigh(self.cosines)
        kept = values > self.noise * values[-1]
        inverse = torch.where(kept, 1 / values.where(kept, 1.0), 0.0)
        return (vectors * inverse) @ vectors.t()

    def square(self, weights: Tensor) -> Tensor:
        """Squared length of the combinations with these weights ``[*, D]``, ``[*]``; never below
        0."""
        return ((weights @ self.products) * weights).sum(-1).clamp(min=0)


class GramWeighting(ABC):
    r"""A function of the Gram matrix :math:`K_{de} = \langle g_d, g_e\rangle` that weighs the
    gradients.

    Calling it takes the symmetric ``[D, D]`` matrix, in any floating dtype and on any device, and
    returns the weights ``[D]`` of :math:`\sum_d w_d\, g_d` like it. It computes in float64, on the
    matrix divided by its largest entry, so that the size of the gradients does not matter: where
    nothing else is said, small gradients are weighed as large ones are. A matrix that is not
    finite has weights of NaN. Nothing is differentiable.
    """

    keeps_state = False  # between calls, so that a row has to be the same domain's in all of them
    same_on_all_ranks = True  # for the same matrix

    def __call__(self, gram: Tensor) -> Tensor:
        check_gram(gram)
        finite = gram.isfinite().all()
        if readable(finite) and not tracing() and not bool(finite):
            return torch.full_like(gram[0], torch.nan)  # and no state moves
        with torch.no_grad():
            weights = self.weights(Gram.of(gram, finite))
            return weights.where(finite, torch.nan).to(gram.dtype)

    @abstractmethod
    def weights(self, gram: Gram) -> Tensor:
        """The weights ``[D]``, float64."""

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name != "generator"]
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({settings})"


def check_gram(gram: Any) -> None:
    if not isinstance(gram, Tensor) or not gram.is_floating_point():
        got = gram.dtype if isinstance(gram, Tensor) else type(gram).__name__
        raise TypeError(
            f"gram: expected a floating-point tensor [D, D], got {got}. Pass "
            "fastdg.domain_gram(losses, domains, params=model), or J @ J.T."
        )
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(
            f"gram: expected inner products of D gradients, [D, D], got {tuple(gram.shape)}. Of a "
            "matrix J with a gradient in each row, pass J @ J.T."
        )

    if readable(gram) and not tracing():
        apart = (gram - gram.t()).abs().max()
        if bool(apart > 1e-2 * gram.abs().max()):
            raise ValueError(
                "gram: expected a symmetric matrix of inner products, got one that is not. Of a "
                "matrix J with a gradient in each row, pass J @ J.T."
            )


def stops(done: Tensor) -> bool:
    """Whether an iteration may end early: never where a look would wait for the device."""
    return not tracing() and readable(done) and bool(done)
