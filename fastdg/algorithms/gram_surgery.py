"""Gradient surgery by any function of the Gram matrix."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..core.combine.combiner import Combined, DomainGradients
from ..core.combine.gathering import scatter_rows
from ..core.combine.weighted import WeightedCombiner
from ..core.combine.weightings import Weighting, keeps_state, of_gram
from ..core.hyper import argument, check_absent, check_switch, hyper
from ..domains import tracing


class GramSurgery(WeightedCombiner):
    r"""Any rule that weighs the domains' gradients by their inner products.

    .. math:: \text{grad} = \sum_d w(K)_d\, g_d, \qquad K_{de} = \langle g_d, g_e \rangle

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        weighting: ``[D, D]`` Gram matrix over all parameters -> ``[D]`` weights, for example one of
            `fastdg.weightings`, a weighting of TorchJD, or the weighting of its aggregators.
            Weightings of the Jacobian or of two batches (``ExcessMTL``, ``SDMGrad``, ``MoDo``)
            raise an error. It is not called for a single domain, whose gradient stays as it is.
        absent: rows of domains without samples in a batch. ``"drop"``: the matrix omits them.
            ``"zeros"``: it is always ``[D, D]``, with rows of zeros, and the weights of these
            domains change nothing. ``"auto"``: zeros for a weighting with state, so that it does
            not mistake a domain for another, else drop.
        normalize: divide the matrix by the power of two next to its trace, which changes no
            digit. For weightings that do not depend on the gradients' scale but compare it with a
            threshold.
        num_domains, model, check: as in `AgrSum`.

    Zeros are right for weightings by domain or by pairs (PCGrad, GradVac, and PCD, whose step is 0
    without its first domain). Weightings that search a short combination (MGDA, CAGrad) give rows
    of zeros all the weight, and means (UPGrad) count them: use ``"drop"`` for these.

    A weighting's buffers, attributes and the objects that it holds are in ``state_dict`` and resume
    bit for bit. A function's own variables are not. On several ranks the weights are rank 0's.

    TorchJD's ``PCGradWeighting`` and others work after ``pip install torchjd``,
    ``UPGradWeighting`` and ``DualProjWeighting`` after ``pip install 'fastdg[weightings]'``. These
    two and ``CAGradWeighting`` treat a matrix with a trace below ``norm_eps=1e-4`` as zeros, so
    conflicts of small gradients remain; the first such step warns. ``normalize=True`` avoids it.

    ``absent`` and ``normalize`` live in ``param_groups[0]`` as ``gramsurgery_absent`` and so on.
    ``statistics`` holds ``loss``, ``gram`` (``[D, D]``), ``cosine`` (``[D, D]``; NaN where there is
    no gradient), ``conflicts`` (pairs of domains with a negative product; 0-dim), ``weights``
    (``[D]``), ``domain_loss`` (``[D]``, NaN for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument, or the result of ``weighting``, is not as described; a
            weighting with state gets another number of domains.

    Reference:
        Quinton, Rey: Jacobian Descent for Multi-Objective Optimization, 2024.

    Example:
        >>> from torchjd.aggregation import UPGradWeighting  # pip install 'fastdg[weightings]'
        >>> opt = fastdg.GramSurgery(torch.optim.Adam(model.parameters()), UPGradWeighting())
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "gramsurgery"

    weighting: Weighting = argument(convert=of_gram, kw_only=False)
    absent: Literal["auto", "zeros", "drop"] = hyper("auto", check_absent)
    normalize: bool = hyper(False, check_switch)

    def combine(self, gradients: DomainGradients) -> Combined:
        return gradients.weighted_sum(self._weights(gradients, gradients.gram()))

    def _weights(self, gradients: DomainGradients, gram: Tensor) -> Tensor:
        """The weights of the domains that ``gram`` has rows of."""
        ids, extent = gradients.ids, gradients.extent
        if len(gram) == 1:
            return gram.new_ones(1)
        if self.absent == "zeros" or (self.absent == "auto" and keeps_state(self.weighting)):
            if keeps_state(self.weighting):
                self.check_extent(extent)
            columns = scatter_rows(gram.t(), ids, extent, 0)
            weights = self.ask(scatter_rows(columns.t(), ids, extent, 0))
            weights = weights if len(ids) == extent else weights[ids]
            return weights.where(gradients.count > 0, 0)
        whole = self._readable or tracing() or bool((present := gradients.count > 0).all())
        if self.absent == "auto" and not (whole and len(gram) == extent):
            self.warn_of_absent()
        if whole:
            return self.ask(gram)
        rows = present.nonzero().squeeze(1)
        part = gram[rows][:, rows]
        weights = self.ask(part) if len(rows) > 1 else part.new_ones(len(rows))
        return weights.new_zeros(len(gram)).index_copy(0, rows.to(weights.device), weights)
