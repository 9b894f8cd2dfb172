"""SMA: average the weights of all steps but the first."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor, nn

from ..averaging.averaged import WAY, Averaged, zeros
from ..averaging.buffers import Buffers, check_shapes, size_of
from ..core.declared_state import Group, PerParameter, PerRun, Rows, RunValue
from ..core.hyper import argument, check_module, check_steps, hyper
from ..dtypes import to_statistics_dtype


def _buffers(opt: SMA) -> Tensor | None:
    found = Buffers(opt.model).now().get("buffers")
    return None if found is None else to_statistics_dtype(found)


def _begun(opt: SMA, group: Group) -> Any:
    return group.get(f"{opt.prefix}_averaged_steps")


class SMA(Averaged):
    r"""Simple moving average: the mean of the weights of every step from one on.

    .. math::
        \bar\theta = \frac1{t - t_0 + 2}\sum_{i=t_0-1}^{t}\theta_i

    after step t, with :math:`\theta_i` the weights after step i. Training goes on as without it.
    Before step :math:`t_0` the average is the model's present weights. For ``start=1`` it begins
    with :math:`\theta_1`; the authors' code has the weights before the first step in it, too.

    Floating buffers in the model's ``state_dict()`` (running statistics of batch norm) are averaged
    alike, as in the authors' code; integers stay the model's. ERM++ computes these statistics anew
    with the averaged weights: `torch.optim.swa_utils.update_bn` does.

    It goes around any wrapper, or a plain optimizer, as the outermost:
    ``fastdg.SMA(fastdg.Fishr(optimizer), model)``. `backward`, its arguments and ``statistics``
    are the inner wrapper's; around a plain optimizer, `ERM`'s, and ``loss.backward()`` works too.

    The model gets the averages inside ``with opt.applied():``, to evaluate them, or by
    ``opt.apply()`` for good; ``opt.averaged()`` is a copy of the model with them.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a wrapper.
        model: its parameters that are in the optimizer are averaged, and its buffers.
        start: :math:`t_0`. Default: of the ensemble of averages, for runs of 5,000 steps; ERM++
            has 600, for 15,000.
        num_domains: D, for the wrapper inside or, around a plain optimizer, for ``statistics``;
            default: as many as the batch has.

    ``start`` lives in ``param_groups[0]`` as ``sma_start``, the averages and their number of steps
    in ``state_dict``: a run that is resumed goes on bit for bit. One copy of weights and buffers,
    in float32 for weights in half precision. A step has a fused update of the weights, for each
    device and dtype, and one of the buffers, put together on one device.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Arpit, Wang, Zhou, Xiong: Ensemble of Averages: Improving Model Selection and Boosting
        Performance in Domain Generalization, NeurIPS 2022. ERM++: Teterwak, Saito, Tsiligkaridis,
        Saenko, Plummer: ERM++: An Improved Baseline for Domain Generalization, WACV 2025.

    Example:
        >>> opt = fastdg.SMA(torch.optim.Adam(model.parameters()), model)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()  # each step
        >>> with opt.applied():
        ...     validate(model)                                         # each evaluation
    """

    prefix = "sma"
    penalises = False

    model: nn.Module = argument(check_module, kw_only=False, show=None)
    start: int = hyper(100, check_steps)

    average = PerParameter("average", "average", begin=zeros, needed=_begun, way=WAY)
    buffers = PerRun(
        "buffers",
        "averaged buffers",
        rows=Rows("numbers", "the buffers of model", lambda opt, group: size_of(_buffers(opt))),
        begin=_buffers,
        needed=_begun,
        way=WAY,
    )
    averaged_steps = RunValue(0)
    _shapes = tuple[Size, ...]()  # of the buffers that are averaged; an annotation makes arguments

    def _check(self, model: nn.Module) -> None:
        if self.averaged_steps:
            check_shapes(self._shapes, Buffers(model).shapes("buffers"))

    def _add(self) -> None:
        if self.steps < self.start - 1:
            return
        now, kept = _buffers(self), self.buffers
        self._join(self.average, self.averaged_steps)
        if now is not None and kept is not None and self.averaged_steps:
            kept.lerp_(now, 1 / (self.averaged_steps + 1))
        elif now is not None:
            self.buffers, self._shapes = now, Buffers(self.model).shapes("buffers")
        self.averaged_steps += 1

    def _finish_load(self) -> None:
        super()._finish_load()
        self._shapes = Buffers(self.model).shapes("buffers")  # as many numbers as the averages

    def _mean(self) -> tuple[dict[Tensor, Tensor], int]:
        if not self.averaged_steps:
            return {p: p.detach() for alike in self._alike() for p in alike}, 1
        return dict(self.average), self.averaged_steps

    def _put_buffers(self, model: nn.Module) -> None:
        self._check(model)
        if self.averaged_steps and self.buffers is not None:
            Buffers(model).put("buffers", self.buffers)
