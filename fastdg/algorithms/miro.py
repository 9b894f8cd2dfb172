"""MIRO: stay close to the features of a pre-trained oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..capture.backbones import find_layers, preset_of
from ..capture.feature_maps import Layout, Oracle, check_layouts
from ..capture.graph_notes import WeakHook
from ..capture.oracle_forwards import OracleForwards
from ..capture.variance_encoder import VarianceEncoder
from ..core.hyper import argument, check_module, check_steepness, check_weight, fixed, hyper, option
from ..core.term import VarianceTerm


class MIRO(VarianceTerm):
    r"""Mutual information regularisation: features that predict a pre-trained oracle's features.

    .. math::
        \text{objective} = \tfrac1N\sum_i \ell_i + \lambda \sum_l \operatorname{mean}_{ncp}
        \tfrac12\Bigl(\frac{(F_l - F^0_l)^2}{s_l} + \log s_l\Bigr), \qquad
        s_l = \operatorname{softplus}(b_l) + 10^{-5}

    with the maps F of some layers, the maps :math:`F^0` of a frozen oracle on the same input, and
    one trained variance s for each channel, 0.1 at the start. By the floor of s the term of a layer
    is at least :math:`\tfrac12\log 10^{-5} \approx -5.76`.

    Each training forward of ``model`` (``model.train()``, gradients enabled) also runs the oracle,
    up to its last named layer. Its maps live until the backward, in its dtype; maps of layers that
    are frozen with all before them are freed at once. Any algorithm may go around this term:
    ``fastdg.Fishr(fastdg.MIRO(...))``.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or another term. It gets
            a parameter group with the variances (``opt.biases``): make schedulers afterwards.
        model: the network in training, with its pre-trained weights if there is no ``oracle``.
        oracle: a frozen network whose layers of the same names give maps of the same shapes;
            default: a copy of ``model`` as it is now. It is put into evaluation mode.
        layers: names of modules of ``model``; default, for backbones of timm, torchvision and
            transformers: the stem and the last block of each stage, and of ViTs the patch embedding
            and every third block (``opt.layers`` says which).
        weight: :math:`\lambda`; lives in ``param_groups[0]`` as ``miro_weight``.
        lr_multiplier: learning rate of the variances, as a multiple of ``param_groups[0]``'s; the
            group's other settings (weight decay) hold for them too.
        layouts: the dimensions of a layer's maps, where its operations do not tell: ``"NC"``
            (channels in dimension 1), ``"NLC"`` (channels last), ``"LNC"`` (samples in dimension 1,
            channels last) or a pair ``(sample dimension, channel dimension)``; one for all, or a
            mapping from layers. By default the first forward is followed: samples are in dimension
            0 of the model's inputs, channels come from a convolution or batch norm in dimension 1,
            from a linear layer, an embedding or a layer norm in the last.
        dtype: of the oracle and its inputs; with ``torch.bfloat16`` its maps take half the memory.
        num_domains: D, for ``statistics``; default: as many as the batch has.

    The paper freezes batch norm (``module.eval()`` after ``model.train()``), with :math:`\lambda`
    from 0.01 to 1. ``statistics`` holds ``miro`` (the sum over the layers, without
    :math:`\lambda`), ``loss``, ``objective`` (0-dim), and alone ``domain_loss`` (``[D]``, NaN for
    an empty domain) and ``domain_count`` (``[D]``). ``state_dict`` keeps the variances, not the
    oracle: give a resumed run the same one, or the same pre-trained weights before it loads its
    own; another oracle is warned of. ``torch.distributed.checkpoint`` wants a module that owns
    every parameter: ``nn.ModuleList([model, *opt.modules()])``.

    Raises:
        TypeError, ValueError: an argument is not as described; a layer that does not exist; maps
            of different shapes; an oracle on another device.
        RuntimeError: `backward` on losses that do not come from a training forward of ``model``;
            a layer that did not run, or whose map is changed in place.

    Reference:
        Cha, Lee, Park, Chun: Domain Generalization by Mutual-Information Regularization with
        Pre-trained Models, ECCV 2022.

    Example:
        >>> opt = fastdg.MIRO(torch.optim.Adam(model.parameters()), model)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "miro"
    check: bool = fixed(True, init=False)
    _transient = (*VarianceTerm._transient, "_forwards")

    model: nn.Module = argument(check_module, kw_only=False, show=None)
    oracle: nn.Module | None = argument(default=None, kw_only=False, show=None)
    layers: Sequence[str] | None = option(None)
    lr_multiplier: float = option(10.0, check_steepness)
    weight: float = hyper(0.1, check_weight)
    layouts: str | Layout | Mapping[str, str | Layout] | None = option(None, show=None)
    dtype: torch.dtype | None = option(None, show=None)

    def _start(self) -> None:
        self.layers = [*find_layers(self.model, self.layers or preset_of(self.model), "model")]
        layouts = check_layouts({} if self.layouts is None else self.layouts, self.layers)
        self._oracle = Oracle(self.oracle, self.model, self.layers, self.dtype)
        self.oracle = self._oracle.network
        like = next(self.model.parameters(), torch.empty(0))
        self._encoders = {name: VarianceEncoder(like, layouts.get(name)) for name in self.layers}
        self._join({"layers": self.layers}, {"oracle": 0})

    def sample_penalty(self, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = self._forwards.of(losses)
        statistics = {"miro": values.detach().mean()}
        if self.weight == 0:  # 0 * inf is NaN
            values.detach_()  # no backward would free its graph, which lives with the losses
            return torch.zeros_like(values.detach()).requires_grad_(), statistics
        return self.weight * values, statistics

    def _recognise(self) -> None:
        self._oracle.recognise(self.param_groups[self._own_group()], "miro_oracle", self.steps)

    def _finish_load(self) -> None:
        super()._finish_load()
        self._forwards.began = False

    def _follow(self) -> None:
        super()._follow()
        name, first = type(self).__name__, WeakHook(self, "_recognise")
        self._forwards = OracleForwards(self.model, self._oracle, self._encoders, name, first)
