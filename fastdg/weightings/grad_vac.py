"""GradVac: gradients turned towards each other as far as they usually agree."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..core.hyper import check_generator, check_reduction, check_share
from ..domains import to_device_async
from .gram import Gram, GramWeighting


class GradVac(GramWeighting):
    r"""Gradient vaccine: where two gradients agree less than they did on average, one is turned
    towards the other.

    For each domain i, from :math:`p_i = g_i` on and for the others j in a random order, with
    :math:`\phi = \cos(p_i, g_j)` and its average :math:`\hat\phi_{ij}`, 0 at first:

    .. math::
        p_i \leftarrow p_i + \frac{|p_i|\,\big(\hat\phi\sqrt{1-\phi^2} -
        \phi\sqrt{1-\hat\phi^2}\big)}{|g_j|\sqrt{1-\hat\phi^2}}\; g_j
        \ \text{ if } \phi < \hat\phi_{ij}, \qquad
        \hat\phi_{ij} \leftarrow (1-\beta)\,\hat\phi_{ij} + \beta\,\phi

    The combination is :math:`\sum_i p_i`. With :math:`\beta = 0` it is PCGrad's. A gradient of
    zeros changes neither others nor averages.

    Args:
        beta: share of a new cosine in the average, in [0, 1]. Default: that of LibMTL and TorchJD.
        reduction: ``"sum"``, the paper's, or ``"mean"`` over the domains.
        generator: where the orders come from; None: torch's own on the CPU. Within an optimizer on
            several ranks the weights are rank 0's.

    State is :math:`\hat\phi` ``[D, D]``, as `phi`, and the generator's.

    Reference:
        Wang, Tsvetkov, Firat, Cao: Gradient Vaccine: Investigating and Improving Multi-task
        Optimization in Massively Multilingual Models, ICLR 2021, arXiv:2010.05874. There each layer
        has a matrix of its own; this is its whole-model variant.
    """

    keeps_state = True
    same_on_all_ranks = False  # of orders that are drawn

    def __init__(
        self,
        beta: float = 0.5,
        reduction: Literal["sum", "mean"] = "sum",
        generator: torch.Generator | None = None,
    ) -> None:
        check_share("beta", beta)
        check_reduction("reduction", reduction)
        check_generator("generator", generator)
        self.beta, self.reduction, self.generator = beta, reduction, generator
        self.phi: Tensor | None = None

    def weights(self, gram: Gram) -> Tensor:
        if self.phi is None or len(self.phi) != len(gram):
            self.phi = torch.zeros_like(gram.products)
        phi = self.phi.to(gram.products)
        coefficients, after = vaccinated(gram, self.order(gram), phi, self.beta)
        self.phi = after.where(gram.finite, phi)
        return coefficients.sum(0) if self.reduction == "sum" else coefficients.mean(0)

    def order(self, gram: Gram) -> Tensor:
        """In which order each domain goes through all of them, ``[D, D]``."""
        device = torch.device("cpu") if self.generator is None else self.generator.device
        keys = torch.rand(
            gram.products.shape, generator=self.generator, dtype=torch.float64, device=device
        )
        return to_device_async(keys.argsort(1), gram.products.device)

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the state of the generator."""
        generator = None if self.generator is None else self.generator.get_state()
        return {"phi": self.phi, "generator": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of another one."""
        self.phi = state["phi"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())


def vaccinated(gram: Gram, order: Tensor, phi: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    r"""The :math:`p_i` as combinations of the gradients, and the averages after them.

    Args:
        order: row i has the domains in the order in which :math:`p_i` meets them, ``[D, D]``.
        phi: the averages before, ``[D, D]``.

    Returns:
        Coefficients ``[D, D]``, a row for each :math:`p_i`; averages ``[D, D]``.
    """
    domains = len(gram)
    own = torch.arange(domains, device=gram.products.device)
    # Row i: products of p_i with all gradients, and p_i itself as a combination of them
    table = torch.cat([gram.products, gram.eye()], 1)
    state, phi = table.clone(), phi.clone()
    for j in order.t():  # one for each i
        products, coefficients = state.split(domains, 1)
        length = (products * coefficients).sum(1).clamp(min=0).sqrt()
        pair = (j != own) & gram.present & gram.present[j] & (length > 0)
        bound = (length * gram.norms[j]).where(pair, 1.0)
        cosine = (products[own, j] / bound).clamp(-1, 1)
        usual = phi[own, j]
        away, usually_away = (1 - cosine**2).sqrt(), (1 - usual**2).clamp(min=1e-30).sqrt()
        turn = length * (usual * away - cosine * usually_away) / (gram.norms[j] * usually_away)
        turn = turn.where(pair & (cosine < usual), 0.0)
        state = state + turn.unsqueeze(1) * table[j]
        phi[own, j] = torch.where(pair, torch.lerp(usual, cosine, beta), usual)
    return state[:, domains:], phi
