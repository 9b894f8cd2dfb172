"""Training forwards of a model, each with a forward of a frozen network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import find_layers
from .feature_maps import Oracle, changed_in_place, check_layout, map_of, not_run, ran_twice
from .graph_notes import Seen, attach_to_graph, attached, hook_on, recording
from .variance_encoder import VarianceEncoder


@dataclass
class Forward:
    """A running forward of the model.

    Attributes:
        maps: layer -> map of the oracle.
        seen: layer that has run -> its map.
    """

    maps: dict[str, Tensor]
    seen: dict[str, Seen] = field(default_factory=dict)


class OracleForwards:
    """Compares the maps of layers with an oracle's, in every training forward of a model.

    Args:
        model: network in training, with hooks for the lifetime of this object.
        oracle: frozen network.
        encoders: layer -> module that compares its maps; the first forward gives its bias a size.
        name: name of the wrapper, for messages.
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
            hook_on(module.register_forward_hook, self, "_on_layer", layer)
        hook_on(model.register_forward_hook, self, "_end")

    def of(self, losses: Tensor) -> Tensor:
        """Return the sum over the layers in the forward of ``losses`` ``[N]``, with its graph.

        Raises:
            RuntimeError: the losses do not come from exactly one training forward.
            ValueError: the forward had another number of samples.
        """
        forwards = attached(losses, self)
        if len(forwards) != 1:
            how = "several training forwards" if forwards else "no training forward"
            raise RuntimeError(
                f"losses: they come from {how} of the {type(self.model).__name__} given to "
                f"{self.name}. Call this module once for each backward (final=False for all except "
                f"the last), after you create {self.name}, with model.train() and outside "
                "torch.no_grad, and do not change its output in place."
            )
        values: Tensor = forwards[0]
        if len(values) != len(losses):
            raise ValueError(
                f"losses: {self.name} saw {len(values)} samples in the forward, got {len(losses)} "
                "losses. Pass one loss for each sample; if the model takes samples in dimension "
                f"1, create {self.name} with layouts='LNC'."
            )
        return values

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the oracle before the model, while the inputs are unchanged."""
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

    def _on_layer(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Check a layer's map against the oracle's, and record it."""
        forward = self.forward
        if forward is None:
            return
        if name in forward.seen:
            raise RuntimeError(ran_twice(name, "model"))
        features, oracle = map_of(name, output), forward.maps[name]
        if features.shape != oracle.shape:
            raise ValueError(
                f"oracle: its map of {name!r} must have the model's shape {tuple(features.shape)}, "
                f"got {tuple(oracle.shape)}. Pass an oracle with the model's architecture."
            )
        encoder = self.encoders[name]
        assert encoder.layout is not None
        check_layout(name, encoder.layout, features)
        encoder.begin(features.shape[encoder.layout[1]], features.device)
        forward.seen[name] = Seen.now(features)

    def _end(self, model: nn.Module, inputs: Any, output: Any) -> Any:
        """Compare the maps after the model's forward, and attach the result for the backward.

        It cannot be earlier: a layer may run inside an activation checkpoint, which would take our
        graph for its own.
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
        return attach_to_graph(output, self, torch.stack(values).sum(0))
