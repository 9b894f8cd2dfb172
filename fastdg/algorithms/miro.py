"""MIRO: stay close to what a pre-trained oracle sees."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch import version_of
from ..capture.backbones import find_layers, preset_of
from ..capture.feature_maps import (
    Layout,
    Oracle,
    changed_in_place,
    check_layout,
    check_layouts,
    map_of,
    not_run,
    ran_twice,
)
from ..capture.graph_notes import Hook, found, leave, recording
from ..capture.variance_encoder import BIAS, VarianceEncoder
from ..core.base_optimizer import check_base
from ..core.base_state import own_part, with_part
from ..core.checkpoint import Kept
from ..core.configured import Configured
from ..core.hyper import check_steepness, check_weight, hyper
from ..core.term import Term
from ..warn import warn_user


@dataclass
class Forward:
    """A forward of the model that is under way.

    Attributes:
        maps: layer -> the oracle's map.
        seen: layer that has run -> its map, and the version of that.
    """

    maps: dict[str, Tensor]
    seen: dict[str, tuple[Tensor, int]] = field(default_factory=dict)


class MIRO(Term):
    r"""Mutual information regularisation with an oracle: features from which those of a
    pre-trained network can still be told.

    .. math::
        \text{objective} = \tfrac1N\sum_i \ell_i + \lambda \sum_l \operatorname{mean}_{ncp}
        \tfrac12\Bigl(\frac{(F_l - F^0_l)^2}{s_l} + \log s_l\Bigr), \qquad
        s_l = \operatorname{softplus}(b_l) + 10^{-5}

    with the maps F of some layers, those :math:`F^0` of a frozen copy on the same input, and one
    variance s for each channel, which is trained along and begins as 0.1. Features that coincide
    with the oracle's gain no more than that floor of s allows: the term of a layer is bounded below
    by :math:`\tfrac12\log 10^{-5} \approx -5.76`.

    Each training forward of ``model`` (``model.train()``, gradients enabled) also runs the oracle,
    up to its last layer of those named. Its maps live until the backward, as the model's own do,
    in the oracle's dtype; where a layer and all before it are frozen they are let go of at once.

    MIRO is a term: it may be wrapped by any algorithm, ``fastdg.Fishr(fastdg.MIRO(...))``.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or another term. It is
            given a parameter group with the variances (``opt.biases``), so schedulers are made
            after this wrapper.
        model: the network in training, with its pre-trained weights if there is no ``oracle``.
        oracle: a frozen network whose layers of the same names give maps of the same shapes;
            default: a copy of ``model`` as it is now. It is put into evaluation mode.
        layers: names of modules of ``model``; default: those of a preset for the backbones of
            timm, torchvision and transformers: the stem and the last block of each stage, and of
            ViTs the patch embedding and every third block (``opt.layers`` says which).
        weight: :math:`\lambda`; lives in ``param_groups[0]`` as ``miro_weight``.
        lr_multiplier: learning rate of the variances, in those of ``param_groups[0]``; what else
            that group has (weight decay) holds for them too.
        layouts: the dimensions of a layer's maps, where the operations that make them do not tell:
            ``"NC"`` (channels in dimension 1), ``"NLC"`` (channels last), ``"LNC"`` (samples in
            dimension 1, channels last) or a pair ``(sample dimension, channel dimension)``; one for
            all, or a mapping from layers. By default the first forward is followed: the samples
            are in dimension 0 of the model's inputs, and channels come from a convolution or batch
            norm in dimension 1, from a linear layer, an embedding or a layer norm in the last.
        dtype: what to convert the oracle to, and its inputs: with ``torch.bfloat16`` its maps take
            half the memory.
        num_domains: D, for ``statistics``; default: as many as the batch has.

    The paper freezes batch norm (``module.eval()`` after ``model.train()``) and uses
    :math:`\lambda` from 0.01 to 1.

    ``statistics`` holds ``miro`` (the sum over the layers, without :math:`\lambda`), ``loss``,
    ``objective`` (0-dim), and alone ``domain_loss`` (``[D]``, NaN for an empty domain) and
    ``domain_count`` (``[D]``). The variances are kept in ``state_dict``; the oracle is not: a run
    that is resumed is given the same one, or starts from the same pre-trained weights before it
    loads its own; another oracle is warned of. ``torch.distributed.checkpoint``
    asks for a module that owns every parameter: ``nn.ModuleList([model, *opt.modules()])``.

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
    tensors = ("bias",)
    _transient = (*Term._transient, "_forward", "_recognised")

    weight: float = hyper(0.1, check_weight)

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        oracle: nn.Module | None = None,
        *,
        layers: Sequence[str] | None = None,
        weight: float = 0.1,
        lr_multiplier: float = 10.0,
        layouts: str | Layout | Mapping[str, str | Layout] | None = None,
        dtype: torch.dtype | None = None,
        num_domains: int | None = None,
    ) -> None:
        check_base(base, type(self).__name__)
        check_steepness("lr_multiplier", lr_multiplier)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self._network = model  # which goes with this wrapper wherever it is copied
        self.layers = list(find_layers(model, layers or preset_of(model), "model"))
        told = check_layouts({} if layouts is None else layouts, self.layers)
        self._oracle = Oracle(oracle, model, self.layers, dtype)
        self.lr_multiplier = lr_multiplier
        like = next(model.parameters(), torch.empty(0))
        self._encoders = {name: VarianceEncoder(like) for name in self.layers}
        for name, layout in told.items():
            self._encoders[name].layout = layout
        self._join(base)
        Configured.__init__(self, base, num_domains=num_domains, model=model, weight=weight)
        self._follow()

    @property
    def oracle(self) -> nn.Module:
        """The frozen network."""
        return self._oracle.network

    @property
    def biases(self) -> dict[str, Tensor]:
        """Layer -> b ``[C]``; empty before the first forward."""
        return {name: encoder.bias for name, encoder in self._encoders.items()}

    def modules(self) -> list[nn.Module]:
        return list(self._encoders.values())

    # -- the parameter group --

    def _join(self, base: Optimizer) -> None:
        """Give the optimizer the group of the variances, or find it there."""
        for group in base.param_groups:
            if group.get("miro_layers") == self.layers:
                for encoder, bias in zip(self._encoders.values(), group["params"], strict=True):
                    encoder.bias = bias
                return
        first = base.param_groups[0]
        if any("initial_lr" in group for group in base.param_groups):
            raise ValueError(
                "base: a scheduler was made for it, and would not know the parameter group that "
                "MIRO adds; make the scheduler after the wrapper"
            )
        group = {key: value for key, value in first.items() if key in base.defaults}
        if "lr" in first:
            group["lr"] = first["lr"] * self.lr_multiplier
        named = [(f"miro.{name}", bias) for name, bias in self.biases.items()]
        own = {"miro_layers": self.layers, "miro_oracle": 0}
        params = named if "param_names" in first else [bias for _, bias in named]
        base.add_param_group({**group, "params": params, **own})

    def _own_group(self) -> int:
        """Where among the groups that of the variances is."""
        own = {id(bias) for bias in self.biases.values()}
        return next(i for i, g in enumerate(self.param_groups) if own & set(map(id, g["params"])))

    def _known(self) -> dict[Tensor, str]:
        own = {bias: f"miro.{name}" for name, bias in self.biases.items()}
        return {**super()._known(), **own}

    # -- forwards --

    def _follow(self) -> None:
        self._forward: Forward | None = None
        self._recognised = False  # the oracle, in the first forward, by when its weights are there
        model = self._network
        handles: list[Any] = [
            model.register_forward_pre_hook(Hook(self, "_begin"), with_kwargs=True)
        ]
        for name, layer in find_layers(model, self.layers, "model").items():
            handles.append(layer.register_forward_hook(Hook(self, "_see", name)))
        handles.append(model.register_forward_hook(Hook(self, "_end")))
        for handle in handles:
            weakref.finalize(self, handle.remove).atexit = False

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run: the oracle does so first, on what nobody has changed yet."""
        self._forward = None
        if not (model.training and recording()):
            return
        self._oracle.check_device(model)
        if not self._recognised:
            self._recognise()
            self._recognised = True
        layouts = {name: encoder.layout for name, encoder in self._encoders.items()}
        self._forward = Forward(self._oracle.maps(args, kwargs, layouts))
        for name, encoder in self._encoders.items():
            encoder.layout = layouts[name]

    def _recognise(self) -> None:
        """Note which oracle this run has, and warn if the run that was loaded had another."""
        group = self.param_groups[self._own_group()]
        before, group["miro_oracle"] = group.get("miro_oracle", 0), self._oracle.fingerprint()
        if before not in (0, group["miro_oracle"]):
            warn_user(
                f"MIRO: the loaded run made its {self.steps} steps with another oracle, or another "
                "dtype= of it. Make the wrapper from the same pre-trained weights before the model "
                "loads its own, or pass the network that has them as oracle="
            )

    def _see(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        """A layer has run: its map has to be like the oracle's."""
        forward = self._forward
        if forward is None:
            return
        if name in forward.seen:
            raise RuntimeError(ran_twice(name, "model"))
        features, oracle = map_of(name, output), forward.maps[name]
        if features.shape != oracle.shape:
            raise ValueError(
                f"oracle: its map of {name!r} has shape {tuple(oracle.shape)}, the model's "
                f"{tuple(features.shape)}"
            )
        encoder = self._encoders[name]
        assert encoder.layout is not None
        check_layout(name, encoder.layout, features)
        channels = features.shape[encoder.layout[1]]
        if encoder.bias.numel() == 0:
            self._fix(encoder, encoder.bias.new_full((channels,), BIAS, device=features.device))
        forward.seen[name] = features, version_of(features)

    def _end(self, model: nn.Module, inputs: Any, output: Any) -> Any:
        """The model has run: compare the maps, and leave the result for the backward.

        Not before: a layer may run inside a checkpoint, which would take our graph for its own.
        """
        forward, self._forward = self._forward, None
        if forward is None:
            return None
        values = []
        for name, encoder in self._encoders.items():
            if name not in forward.seen:
                raise RuntimeError(not_run(name, "model"))
            features, version = forward.seen.pop(name)
            if version_of(features) != version:
                raise changed_in_place(name, "model")
            values.append(encoder(features, forward.maps.pop(name)))
        return leave(output, self, torch.stack(values).sum(0))

    def _fix(self, encoder: VarianceEncoder, bias: Tensor) -> None:
        """The number of channels is known: b gets its size."""
        encoder.bias.data = bias
        self._own_state["bias"][encoder.bias] = encoder.bias.detach()

    def _term(self, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        forwards = found(losses, self)
        if len(forwards) != 1:
            how = "several training forwards" if forwards else "no training forward"
            raise RuntimeError(
                f"losses: {how} of the {type(self._network).__name__} given to MIRO lead to them; "
                "call that very module once for each backward (final=False for all but the last), "
                "after MIRO was made, with model.train() and outside torch.no_grad, and do not "
                "change its output in place"
            )
        values, statistics = forwards[0], {"miro": forwards[0].detach().mean()}
        if len(values) != len(losses):
            raise ValueError(
                f"losses: got {len(losses)}, but their forward had {len(values)} samples for MIRO. "
                "Pass one loss for each sample; if the model takes samples in dimension 1, make "
                "MIRO with layouts='LNC'"
            )
        if self.weight == 0:  # 0 * inf is NaN
            values.detach_()  # no backward would free its graph, which lives with the losses
            return torch.zeros_like(values.detach()).requires_grad_(), statistics
        return self.weight * values, statistics

    # -- state and copies --

    def _split_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        own = self._own_group()
        part = own_part(state_dict, self.param_groups)
        groups = list(part["param_groups"])
        if len(groups) == len(self.param_groups) - 1:  # of the optimizer inside, without MIRO
            ids = [f"miro.{name}" for name in self.layers]
            groups.insert(own, {**self.param_groups[own], "params": ids})
            state_dict = with_part(state_dict, {**part, "param_groups": groups})
        return super()._split_state(state_dict)

    def _finish_load(self) -> None:
        super()._finish_load()
        self._recognised = False
        loaded, self._own_state["bias"] = self._own_state["bias"], {}
        for encoder in self._encoders.values():
            if (bias := loaded.get(encoder.bias)) is not None:
                self._fix(encoder, bias.to(encoder.bias.dtype))
            elif encoder.bias.numel():
                self._fix(encoder, torch.full_like(encoder.bias, BIAS))

    def _validate_state(self, kept: Kept, groups: Sequence[dict[str, Any]]) -> None:
        way = "run the model once, in training mode, before loading"
        self._require_kept(kept, groups, "bias", "the variances", way)
        for name, encoder in self._encoders.items():
            bias = kept["bias"].get(encoder.bias)
            if bias is not None and encoder.bias.numel() and bias.shape != encoder.bias.shape:
                raise ValueError(
                    f"state_dict: its variances of {name!r} are of {bias.numel()} channels, here "
                    f"there are {encoder.bias.numel()}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._own_state["bias"] = {b: b.detach() for b in self.biases.values() if b.numel()}
        self._follow()

    def settings(self) -> dict[str, Any]:
        own = {"layers": self.layers, "lr_multiplier": self.lr_multiplier}
        return {**own, **super().settings()}
