"""SD: spectral decoupling, small logits."""

from __future__ import annotations

from torch import Tensor

from ..._torch import has_graph
from ...core.hyper import check_weight, hyper
from ...core.term import Term
from ...dtypes import to_statistics_dtype


class SD(Term):
    r"""Spectral decoupling: a term that keeps logits small, so that features which are learned
    first do not starve the others.

    .. math:: r_i = w\,\tfrac1C \sum_c z_{ic}^2

    It is DomainBed's form; the paper has the sum over classes times :math:`\lambda/2`, so that
    :math:`w = \lambda C/2`. Like every term it goes inside any algorithm:
    ``fastdg.Fishr(fastdg.SD(optimizer))``. Pass the logits ``[N, *]``, with their graph:
    ``opt.backward(losses, domains, logits=logits)``.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a term.
        penalty_weight: w.
        num_domains: D, for ``statistics``.
        model: its parameters' names are used in messages.

    ``statistics`` holds ``sd``, the mean of :math:`r_i/w`, and ``objective``, 0-dim.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Pezeshki, Kaba, Bengio, Courville, Precup, Lajoie: Gradient Starvation: A Learning
        Proclivity in Neural Networks, NeurIPS 2021.
    """

    prefix = "sd"

    penalty_weight: float = hyper(0.1, check_weight)

    def sample_penalty(self, losses: Tensor, *, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not has_graph(logits):
            raise ValueError(
                "logits: expected a tensor with its graph, got one without. Pass the tensor from "
                "which the losses are computed."
            )
        values = to_statistics_dtype(logits).reshape(len(logits), -1).square().mean(1)
        total, _ = self.weighted({"": (self.penalty_weight, values)})
        return total, {"sd": values.detach().mean()}
