"""GGA: in a window of steps, the weights near by at which the domains agree best."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core.combine.combiner import Combined, DomainGradients, pair_cosines
from ..core.hyper import check_count, check_weight, hyper
from ..outer.search import Search


class GGA(Search):
    r"""Gradient-guided annealing: steps begin at the best of some random weights near by.

    In the steps from ``start`` to ``end``, with :math:`\theta_0` the model's weights,

    .. math::
        \theta \leftarrow \theta + \xi, \quad \xi \sim \mathcal U(-\rho, \rho)
        \quad (\text{candidates times}), \qquad
        s(\theta) = \min_{d<e} \cos(g_d, g_e)

    a candidate is accepted where s is above that of the best one so far, and the mean loss less
    than ``tolerance`` above that one's. The search then goes back to :math:`\theta_0`; the noise of
    candidates that are not accepted stays, so that it wanders until one is. Last, the optimizer
    steps from the best weights, with their gradient of the mean loss. All other steps are plain.

    Pass a closure that runs the model on the same batch each time, and returns ``(losses,
    domains)``: ``opt.step(closure)`` calls it candidates + 1 times in such a step (``.grad`` is
    cleared before each), once in others.
    One backward judges a candidate, whatever the number of domains, where the authors' code takes
    one for each, and a last one.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        start, end: the first and the last step of the window; steps count from 0.
        size: :math:`\rho`; the authors have 1e-6 for VLCS.
        candidates: number of candidates.
        tolerance: how far above the best one's a loss may be.
        featurizer: its parameters alone get noise, as in the authors' code: the network but its
            last layer. The optimizer has to train some. Default: all parameters of the optimizer.
        generator: where the noise comes from; on the device of the parameters, or it costs a copy.
            Its state is kept in ``state_dict`` and restored by loading. Default: torch's own.
        num_domains, model, check: as in `AgrSum`.

    Defaults are the authors'. Each candidate waits for the device once. Buffers (running
    statistics) move in every forward, as in the authors' code; three copies of the weights are
    kept during a search. A ``GradScaler`` takes no closures. Weights in half precision
    are too coarse for such noise, of which it warns: keep them in float32 and use autocast.

    ``statistics`` as in `GramSurgery`, with ``similarity`` s, of the best candidate, and
    ``accepted``, the number of candidates that were (0-dim).

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: a step within the window has no closure.

    Reference:
        Ballas, Diou: Gradient-Guided Annealing for Domain Generalization, CVPR 2025,
        arXiv:2502.20162.
    """

    prefix = "gga"

    start: int = hyper(100, check_count)
    end: int = hyper(200, check_count)
    tolerance: float = hyper(0.1, check_weight)

    @property
    def searches(self) -> bool:
        return self.start <= self.steps <= self.end

    def combine(self, gradients: DomainGradients) -> Combined:
        cosine, pairs = pair_cosines(gradients)
        count = gradients.count.to(cosine.dtype)
        gradients.log(similarity=cosine.where(pairs > 0, 1.0).amin())
        return gradients.weighted_sum(count / count.sum())

    def better(self, now: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> Tensor:
        rise = now["loss"] - best["loss"]
        return (rise < self.tolerance) & (now["similarity"] > best["similarity"])
