"""Training forwards of a model, each with a forward of a frozen network beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import find_layers
from .feature_maps import Oracle, changed_in_place, check_layout, map_of, not_run, ran_twice
from .graph_notes import Seen, found, hook_on, leave, recording
from .variance_encoder import VarianceEncoder


@dataclass
class Forward:
    """A forward of the model that is under way.

    Attributes:
        maps: layer -> the oracle's map.
        seen: layer that has run -> its map.
    """

    maps: dict[str, Tensor]
    seen: dict[str, Seen] = field(default_factory=dict)


class OracleForwards:
    """Compares the maps of layers with an oracle's, in every training forward of a model.

    Args:
        model: the network in training, which is hooked for as long as this lives.
        oracle: the frozen network.
        encoders: layer -> the module that compares its maps; its bias gets a size.
        name: of the wrapper, in messages.
        first: called before the first forward.
    """

    def __init__(
        self,
        model: nn.Module,
        oracle: Oracle,
        encoders: Mapping[str, VarianceEncoder],
        name: str,
        first: Callable[[], Any],
    ) -> None:
        self.model, self.oracle, self.encoders, self.name = model, oracle, encoders, name
        self.first, self.began = first, False
        self.forward: Forward | None = None
        hook_on(partial(model.register_forward_pre_hook, with_kwargs=True), self, "_begin")
        for layer, module in find_layers(model, [*encoders], "model").items():
            hook_on(module.register_forward_hook, self, "_see", layer)
        hook_on(model.register_forward_hook, self, "_end")

    def of(self, losses: Tensor) -> Tensor:
        """The sum over the layers in the forward that ``losses`` come from, ``[N]``, with its
        graph.

        Raises:
            RuntimeError: they do not come from one training forward.
            ValueError: it had another number of samples.
        """
        forwards = found(losses, self)
        if len(forwards) != 1:
            how = "several training forwards" if forwards else "no training forward"
            raise RuntimeError(
                f"losses: {how} of the {type(self.model).__name__} given to {self.name} lead to "
                "them; call that very module once for each backward (final=False for all but the "
                f"last), after {self.name} was made, with model.train() and outside torch.no_grad, "
                "and do not change its output in place"
            )
        values: Tensor = forwards[0]
        if len(values) != len(losses):
            raise ValueError(
                f"losses: got {len(losses)}, but their forward had {len(values)} samples for "
                f"{self.name}. Pass one loss for each sample; if the model takes samples in "
                f"dimension 1, make {self.name} with layouts='LNC'"
            )
        return values

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run: the oracle runs before it, on inputs as they are now."""
        self.forward = None
        if not (model.training and recording()):
            return
        self.oracle.check_device(model)
        if not self.began:
            self.first()
            self.began = True
        layouts = {name: encoder.layout for name, encoder in self.encoders.items()}
        self.forward = Forward(self.oracle.maps(args, kwargs, layouts))
        for name, encoder in self.encoders.items():
            encoder.layout = layouts[name]

    def _see(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        """A layer has run: its map has to be like the oracle's."""
        forward = self.forward
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
        encoder = self.encoders[name]
        assert encoder.layout is not None
        check_layout(name, encoder.layout, features)
        encoder.begin(features.shape[encoder.layout[1]], features.device)
        forward.seen[name] = Seen.now(features)

    def _end(self, model: nn.Module, inputs: Any, output: Any) -> Any:
        """The model has run: compare the maps, and leave the result for the backward.

        Not before: a layer may run inside a checkpoint, which would take our graph for its own.
        """
        forward, self.forward = self.forward, None
        if forward is None:
            return None
        values = []
        for name, encoder in self.encoders.items():
            if name not in forward.seen:
                raise RuntimeError(not_run(name, "model"))
            seen = forward.seen.pop(name)
            if seen.changed():
                raise changed_in_place(name, "model")
            values.append(encoder(seen.tensor, forward.maps.pop(name)))
        return leave(output, self, torch.stack(values).sum(0))
