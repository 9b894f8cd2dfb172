"""PCGrad: remove from each domain's gradient its conflicts with the others."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core.combine.combiner import Combined, DomainGradients
from ..core.combine.seeded import RandomCombiner
from ..core.hyper import check_reduction, check_switch, hyper
from ..domains import to_device_async


class PCGrad(RandomCombiner):
    r"""Projecting conflicting gradients: remove from each domain's step its conflicts with others.

    For each domain i, from :math:`p_i = g_i` on and for the others j in a random order,

    .. math::
        p_i \leftarrow p_i - \min\Big(0, \frac{\langle p_i, g_j\rangle}{\|g_j\|^2}\Big) g_j,
        \qquad \text{grad} = \tfrac1D \textstyle\sum_i p_i

    over all parameters at once. Every :math:`p_i` is a combination of the :math:`g_d`, so that
    their Gram matrix decides everything. A gradient of zeros is projected on by nothing. One domain
    alone has the plain gradient.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        reduction: ``"mean"`` over the domains, or ``"sum"``, the papers' scale.
        shared_order: one order of the domains for all i, as in the code of Mansilla et al., in
            place of one for each.
        generator: where the orders come from. Its state is kept in ``state_dict`` and restored by
            loading. Default: torch's own on the CPU.
        num_domains, model, check: as in `AgrSum`.

    The domains of the batch are put in order when their ids are on the CPU; with ids on another
    device and ``num_domains`` all D. ``statistics`` as in `GramSurgery`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Yu, Kumar, Gupta, Levine, Hausman, Finn: Gradient Surgery for Multi-Task Learning,
        NeurIPS 2020. Mansilla, Echeveste, Milone, Ferrante: Domain Generalization via Gradient
        Surgery, ICCV 2021.
    """

    prefix = "pcgrad"

    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)
    shared_order: bool = hyper(False, check_switch)

    def combine(self, gradients: DomainGradients) -> Combined:
        gram = gradients.gram()
        weights = gradients.domain_weights(self.reduction).double()
        return gradients.weighted_sum(weights @ projected(gram, self._order(gram)))

    def _order(self, gram: Tensor) -> Tensor:
        """In which order each domain goes through all of them, ``[D, D]``."""
        domains = len(gram)
        device = torch.device("cpu") if self.generator is None else self.generator.device
        generator = self.generator_on(device)
        if self.shared_order:
            order = torch.randperm(domains, generator=generator, device=device).repeat(domains, 1)
        else:
            keys = torch.rand(
                (domains, domains), generator=generator, dtype=torch.float64, device=device
            )
            order = keys.argsort(1)
        return to_device_async(order, gram.device)


def projected(gram: Tensor, order: Tensor) -> Tensor:
    r"""PCGrad in terms of the Gram matrix: :math:`p_i = \sum_d c_{id}\, g_d`.

    Args:
        gram: inner products of the gradients, ``[D, D]``.
        order: row i has the domains in the order in which :math:`p_i` is projected, ``[D, D]``.

    Returns:
        The coefficients c, ``[D, D]`` float64, on the device of ``gram``.
    """
    domains = len(gram)
    # Row j: the products of g_j, and g_j itself as a combination of all. Row i of the second one:
    # the same of p_i, which begins as g_i.
    table = torch.cat([gram.double(), torch.eye(domains, device=gram.device)], 1)
    state, zero = table.clone(), table.new_zeros(())
    steps = order.t()  # in each, one j for every i
    squares = table.diagonal()[steps]
    others = steps != torch.arange(domains, device=gram.device)
    divisors = torch.where((squares > 0) & others, squares, torch.inf)
    for j, divisor in zip(steps.unsqueeze(2), divisors.unsqueeze(2), strict=True):
        rate = torch.fmin(state.gather(1, j), zero) / divisor  # of a product of NaN it is 0
        state.addcmul_(rate, table[j.squeeze(1)], value=-1)
    return state[:, domains:]
