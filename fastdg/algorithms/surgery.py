"""Gradient surgery: Agr-Sum, Agr-Rand and PCGrad."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core.domain_gradients import Combined, DomainGradientOptimizer, Statistics
from ..core.gathering import Gradients, moved
from ..core.hyper import check_reduction, check_switch, hyper
from ..core.random_state import DrawingOptimizer
from ..distributed.sharding import own_part
from ..weightings import Weighting


class AgrSum(DomainGradientOptimizer):
    r"""Agreement: the domains' mean gradient where all of them have the same sign, else 0.

    .. math::
        \text{grad}_k = 1\Big[\big|\textstyle\sum_d \operatorname{sign} g_{dk}\big| = D\Big]
        \cdot \tfrac1D \textstyle\sum_d g_{dk}

    The sign of 0 is 0: a domain without a gradient at a place disagrees there. Where nothing agrees
    the gradient is 0. One domain alone has the plain gradient.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        reduction: ``"mean"`` over the domains, or ``"sum"``, the paper's scale.
        num_domains: D; default: as many as the batch has. A domain without samples in a batch
            takes no part in it.
        model: its parameters' names are those of messages.
        check: has no effect any more.

    ``reduction`` lives in ``param_groups[0]`` as ``agrsum_reduction``. For batch norm in training
    mode run a forward for each domain: `fastdg.core.domain_gradients.DomainGradientOptimizer`.

    ``statistics`` holds ``loss``, ``agreeing`` (share of all entries; 0-dim),
    ``agreeing_by_parameter`` (in the order of ``opt.parameter_names``; NaN for one not used),
    ``domain_loss`` (``[D]``, NaN for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Mansilla, Echeveste, Milone, Ferrante: Domain Generalization via Gradient Surgery,
        ICCV 2021.

    Example:
        >>> opt = fastdg.AgrSum(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "agrsum"

    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)

    def _surgery(self, gradients: Gradients) -> tuple[Combined, Statistics]:
        masked = self._masked(gradients, self.reduction, threshold=1.0)
        return masked.combined, masked.statistics


class AgrRand(DrawingOptimizer):
    r"""`AgrSum` with noise in place of the zeros.

    Where the signs do not agree the gradient is drawn from :math:`\mathcal N(0, \sigma^2)`, with
    :math:`\sigma` the mean magnitude of all entries of the network that agree, one number. Where
    nothing agrees :math:`\sigma = 0` (the paper's code gives NaN).

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        reduction: ``"mean"`` over the domains, or ``"sum"``, the paper's scale.
        generator: where the noise comes from; on the device of the parameters, or it costs a copy.
            Its state is kept in ``state_dict`` and restored by loading. Default: torch's own.
        num_domains, model, check: as in `AgrSum`.

    Noise of every parameter's full size is drawn, in the order of ``opt.parameter_names``.
    ``statistics`` as in `AgrSum`, and ``sigma`` (0-dim).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Mansilla, Echeveste, Milone, Ferrante: Domain Generalization via Gradient Surgery,
        ICCV 2021.
    """

    prefix = "agrrand"

    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)

    def _surgery(self, gradients: Gradients) -> tuple[Combined, Statistics]:
        masked = self._masked(gradients, self.reduction, threshold=1.0)
        sigma = masked.size * gradients.several  # in one domain a zero is no disagreement
        combined = masked.combined
        device = next(iter(combined)).device if self.generator is None else self.generator.device
        source = self._source(device)
        for p, grad in combined.items():
            noise = torch.randn(p.shape, generator=source, dtype=grad.dtype, device=device)
            noise = moved(own_part(p, noise), grad.device).mul_(sigma)
            # A sum of what has one sign is 0 only where the mask is
            combined[p] = torch.where(grad == 0, noise, grad)
        self._remember()
        return combined, {**masked.statistics, "sigma": sigma}


class PCGrad(DrawingOptimizer):
    r"""Projecting conflicting gradients: what one domain's step undoes of another's is taken out.

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

    def _surgery(self, gradients: Gradients) -> tuple[Combined, Statistics]:
        def weights(gram: Tensor) -> Tensor:
            return gradients.weights(self.reduction).double() @ projected(gram, self._order(gram))

        return weighed(gradients, weights)

    def _order(self, gram: Tensor) -> Tensor:
        """In which order each domain goes through all of them, ``[D, D]``."""
        domains = len(gram)
        device = torch.device("cpu") if self.generator is None else self.generator.device
        generator = self._source(device)
        if self.shared_order:
            order = torch.randperm(domains, generator=generator, device=device).repeat(domains, 1)
        else:
            keys = torch.rand(
                (domains, domains), generator=generator, dtype=torch.float64, device=device
            )
            order = keys.argsort(1)
        self._remember()
        return moved(order, gram.device)


def projected(gram: Tensor, order: Tensor) -> Tensor:
    r"""PCGrad in terms of the Gram matrix: :math:`p_i = \sum_d c_{id}\, g_d`.

    Args:
        gram: inner products of the gradients, ``[D, D]``.
        order: row i has the domains in the order in which :math:`p_i` is projected, ``[D, D]``.

    Returns:
        The coefficients c, ``[D, D]`` float64, on the device of ``gram``.
    """
    domains = len(gram)
    own = torch.arange(domains, device=gram.device)
    # Row j: the products of g_j, and g_j itself as a combination of all. Row i of the second one:
    # the same of p_i, which begins as g_i.
    table = torch.cat([gram.double(), torch.eye(domains, device=gram.device)], 1)
    state = table.clone()
    steps = order.t()  # in each, one j for every i
    squares = gram.double().diagonal()[steps]
    divisors = torch.where((squares > 0) & (steps != own), squares, torch.inf)
    for j, divisor in zip(steps, divisors, strict=True):
        product = state[own, j]
        rate = torch.where(product < 0, product / divisor, 0)
        state.addcmul_(rate.unsqueeze(1), table[j], value=-1)
    return state[:, domains:]


def weighed(gradients: Gradients, weighting: Weighting) -> tuple[Combined, Statistics]:
    """The gradients' weighted sum, the weights being a function of their Gram matrix."""
    gram = gradients.gram()
    weights = weighting(gram)
    combined = gradients.combined(weights)
    norm = gram.diagonal().sqrt()
    place = torch.arange(len(gram), device=gram.device)
    pairs = place.unsqueeze(1) < place  # triu would wake torch's threads for a few numbers

    def matrix(values: Tensor, fill: float) -> Tensor:
        return gradients.spread(gradients.spread(values, fill).t(), fill).t()

    return combined, {
        "gram": matrix(gram, 0),
        "cosine": matrix(gram / norm / norm.unsqueeze(1), torch.nan),
        "conflicts": ((gram < 0) & pairs).sum(),
        "weights": gradients.spread(weights.detach(), 0),
    }
