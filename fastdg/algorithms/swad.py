"""SWAD: average the weights of every step in a valley of the validation loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..averaging.segmented import Segmented
from ..averaging.valley import RULES
from ..core.hyper import argument, check_module, check_one_of, check_steps, check_weight, hyper


class SWAD(Segmented):
    r"""Stochastic weight averaging, densely: the mean of the weights of every step within a valley
    of the validation loss.

    .. math::
        \bar\theta = \frac1{t_e-t_s+1}\sum_{t=t_s}^{t_e}\theta_t

    Training goes on as without it. `step` adds the new weights to the mean of a segment, and
    `evaluate`, called with the validation loss at each evaluation, ends the segment. With the
    losses :math:`E_k`, the valley begins with the segment that ends at evaluation k if
    :math:`E_k` is the least of the ``n_converge`` losses from there on. It ends before the first
    ``n_tolerance`` evaluations in a row that are all above

    .. math:: (1 + r) \cdot \operatorname{mean}(E_k, \dots, E_{k + \text{n\_converge} - 1})

    and ``finished`` is then True: further training changes nothing. Training may also stop before:
    the average covers all segments from the valley's beginning on; without a valley, the last
    segment (all steps, with a warning, if `evaluate` was never called).

    It goes around any wrapper, or a plain optimizer, as the outermost:
    ``fastdg.SWAD(fastdg.Fishr(optimizer), model)``. `backward`, its arguments and ``statistics``
    are the inner wrapper's, or `ERM`'s around a plain optimizer. There ``loss.backward()`` works
    too.

    The model gets the averages inside ``with opt.applied():``, to evaluate them, or by
    ``opt.apply()`` for good; ``opt.averaged()`` is a copy of the model with them. Buffers stay the
    model's own, so batch norm in training needs another pass over the training data:
    ``opt.apply()`` and ``torch.optim.swa_utils.update_bn(loader, model)``, or the same with a copy.
    Frozen norms need none: `update_bn` would overwrite their statistics.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a wrapper.
        model: its parameters that are in the optimizer are averaged.
        n_converge: evaluations among which the first has to be the best for a valley to begin.
        n_tolerance: evaluations above the threshold, in a row, that end it.
        tolerance_ratio: r.
        rule: ``"paper"``, as above, or ``"code"``, as the authors' code has it.
        num_domains: D, for the wrapper inside or, around a plain optimizer, for ``statistics``;
            default: as many as the batch has.

    With ``rule="code"`` the valley is found and ends as above (so does its threshold, for losses
    above 0), but the average is another one:

    * All segments have the same weight, whatever their number of steps.
    * With ``n_tolerance > n_converge`` it begins up to ``n_tolerance - n_converge`` segments
      earlier, after the last of these with a loss above the threshold, and skips the first one.
    * In a valley found at one of the first evaluations the segments that come first join again at
      each evaluation until ``n_tolerance`` have been made; later, the valley's first joins twice if
      older ones joined. With ``n_tolerance <= n_converge`` it does not join at all.
    * If training stops in a valley, segments at its end whose losses are all above the threshold do
      not join, nor do steps since the last evaluation.

    A loss that is NaN is refused; their code begins a valley there that never ends.

    The settings live in ``param_groups[0]`` (as ``swad_n_converge`` and so on), losses and counts
    beside them, the averages in ``state_dict``: a run that is resumed goes on bit for bit. At most
    ``max(n_converge, n_tolerance - 1) + 2`` averages are held (one more with ``rule="code"``), in
    float32 for weights in half precision. One fused update a step.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Cha, Chun, Lee, Cho, Park, Lee, Park: SWAD: Domain Generalization by Seeking Flat Minima,
        NeurIPS 2021. The threshold is the paper's with :math:`1 + r` for its r; the defaults are
        from its code, khanrc/swad, whose ``LossValley`` is ``rule="code"``.

    Example:
        >>> opt = fastdg.SWAD(torch.optim.Adam(model.parameters()), model)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()  # each step
        >>> opt.evaluate(validation_loss)                               # each evaluation
        >>> opt.apply()                                                 # at the end
    """

    prefix = "swad"
    penalises = False

    model: nn.Module = argument(check_module, kw_only=False, show=None)
    n_converge: int = hyper(3, check_steps)
    n_tolerance: int = hyper(6, check_steps)
    tolerance_ratio: float = hyper(0.3, check_weight)
    rule: Literal["paper", "code"] = hyper("paper", check_one_of(*RULES))

    @torch.no_grad()
    def evaluate(self, validation_loss: float | Tensor) -> None:
        """End a segment with the validation loss of the model as it is, lower is better; of several
        ranks, all of which call this, with the mean of theirs.

        Raises:
            TypeError, ValueError: the loss is not a finite number, on this rank or another.
            RuntimeError: no step was made since the last evaluation.
        """
        loss = self.loss_of_ranks("validation_loss", validation_loss)
        if not self.finished:
            self._end_segment(loss)
            self._apply_rule()
            self._warn_if_rising(loss)
