"""Feature maps: their layout, and an oracle's maps."""

from __future__ import annotations

import copy
import difflib
import zlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._torch import pytree
from ..distributed.sharding import sharded
from ..warn import warn_user
from .axes import Axes
from .backbones import find_layers
from .graph_notes import Seen

Layout: TypeAlias = tuple[int, int]  # the dimensions of the samples and of the channels
LAYOUTS: dict[str, Layout] = {"NC": (0, 1), "NLC": (0, -1), "LNC": (1, -1)}


def map_of(name: str, output: Any) -> Tensor:
    """Return the feature map in a layer's output: the output itself, or the first tensor in it."""
    leaves = [output] if isinstance(output, Tensor) else pytree.tree_leaves(output)
    tensor = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if tensor is None or tensor.dim() < 2 or not tensor.is_floating_point():
        what = type(output).__name__ if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(
            f"layers: {name!r} must return a feature map (N, C, ...), got {what}. Name another "
            "module."
        )
    return tensor


def layout_of(name: str, axes: Axes, features: Tensor) -> Layout:
    """Return the dimensions of a map's samples and channels, as ``axes`` has followed them.

    Raises:
        ValueError: they are not known.
    """
    channel = axes.channel(features)
    if channel is not None:
        sample = axes.sample(features, channel)
        if sample is not None:
            return sample, channel
    missing = "the channels" if channel is None else f"the {axes.samples} samples"
    raise ValueError(
        f"layouts: cannot tell which dimension of the output {tuple(features.shape)} of {name!r} "
        f"has {missing}. Pass layouts={{{name!r}: 'NC'}} for channels in dimension 1, 'NLC' for "
        "channels in the last, 'LNC' for samples in dimension 1 and channels in the last, or "
        "a pair (sample dimension, channel dimension)."
    )


def check_layouts(layouts: Any, names: Iterable[str]) -> dict[str, Layout]:
    """Check the given layouts, and return them by layer."""
    names = list(names)
    known = f"one of {list(LAYOUTS)} or a pair (sample dimension, channel dimension)"
    if isinstance(layouts, (str, tuple)):
        layouts = dict.fromkeys(names, layouts)
    if not isinstance(layouts, Mapping):
        raise TypeError(
            f"layouts: expected {known}, or a mapping from layers to these, got "
            f"{type(layouts).__name__}."
        )
    found: dict[str, Layout] = {}
    for name, layout in layouts.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
            raise ValueError(f"layouts: {name!r} is not among the layers. Nearest: {near}.")
        pair = LAYOUTS.get(layout, layout) if isinstance(layout, str) else layout
        if not (
            isinstance(pair, tuple) and [type(d) for d in pair] == [int, int] and pair[0] != pair[1]
        ):
            raise ValueError(f"layouts: expected {known}, got {layout!r}.")
        found[name] = pair
    return found


def check_layout(name: str, layout: Layout, features: Tensor) -> None:
    """Raise ValueError unless a map has these dimensions."""
    dims = features.dim()
    sample, channel = layout
    if not (-dims <= sample < dims and -dims <= channel < dims and (sample - channel) % dims):
        raise ValueError(
            f"layouts: {name!r} returns {tuple(features.shape)}, which has no samples in dimension "
            f"{sample} and channels in dimension {channel}. Pass layouts={{{name!r}: (sample "
            "dimension, channel dimension)}."
        )


class _Enough(BaseException):
    """Stops a forward once all maps are known."""


class Oracle:
    """A frozen network that computes feature maps.

    Args:
        network: the network, set to evaluation mode; None: a copy of ``model`` as it is now.
        model: network in training.
        names: names of the layers.
        dtype: dtype to convert the network and its inputs to; None: no conversion.
    """

    def __init__(
        self,
        network: nn.Module | None,
        model: nn.Module,
        names: Iterable[str],
        dtype: torch.dtype | None,
    ) -> None:
        if network is None:
            try:
                network = copy.deepcopy(model)
            except Exception as error:
                raise TypeError(
                    f"oracle: the model cannot be copied ({error}). Pass oracle=, another instance "
                    "with the pre-trained weights."
                ) from error
            network.requires_grad_(False)
        if not isinstance(network, nn.Module):
            raise TypeError(f"oracle: expected an nn.Module, got {type(network).__name__}.")
        if network is model:
            raise ValueError(
                "oracle: got the model itself, which training changes. Omit oracle= for a copy of "
                "the model as it is now."
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point dtype or None, got {dtype}.")
        self.network = network if dtype is None else network.to(dtype)
        self.names, self.dtype = list(names), dtype
        find_layers(self.network, self.names, "oracle")
        self.check_device(model)

    def check_device(self, model: nn.Module) -> None:
        """Raise ValueError unless oracle and model are on the same device."""
        own, other = (next(net.parameters(), None) for net in (self.network, model))
        if own is not None and other is not None and own.device != other.device:
            raise ValueError(
                f"oracle: it must be on the model's device {other.device}, got {own.device}. Move "
                "the model before you create the wrapper, or move the oracle too: "
                f"opt.oracle.to({str(other.device)!r})."
            )

    @torch.no_grad()
    def fingerprint(self) -> int:
        """Compute a checksum of the oracle's state, equal on all devices and ranks."""
        found = 1  # 0 stands for no oracle
        for tensor in self.network.state_dict().values():
            dense = type(tensor) is Tensor and tensor.layout == torch.strided
            if dense or sharded(tensor):  # skips quantised tensors
                whole = tensor.full_tensor() if sharded(tensor) else tensor
                octets = whole.cpu().contiguous().flatten().view(torch.uint8)
                found = zlib.crc32(octets.numpy(), found)
        return found

    def recognise(self, group: dict[str, Any], key: str, steps: int) -> None:
        """Save the oracle's checksum in a parameter group; warn if the run had another oracle."""
        before, group[key] = group.get(key, 0), self.fingerprint()
        if before not in (0, group[key]):
            warn_user(
                f"oracle: the loaded run made its {steps} steps with another oracle or another "
                "dtype=. Create the wrapper while the model has the same pre-trained weights, "
                "before it loads its own, or pass a network with these weights as oracle=."
            )

    @torch.no_grad()
    def maps(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], layouts: dict[str, Layout | None]
    ) -> dict[str, Tensor]:
        """Return the map of each layer for this input; replace ``layouts`` that are None."""
        found: dict[str, Tensor] = {}

        def see(name: str, output: Any) -> None:
            if name in found:
                raise RuntimeError(ran_twice(name, "oracle"))
            found[name] = map_of(name, output)
            if layouts[name] is None:
                assert axes is not None
                layouts[name] = layout_of(name, axes, found[name])
            seen[name] = Seen.now(found[name])
            if len(found) == len(self.names):
                raise _Enough

        seen: dict[str, Seen] = {}
        layers = find_layers(self.network, self.names, "oracle")
        handles = [
            layer.register_forward_hook(lambda module, inputs, out, name=name: see(name, out))
            for name, layer in layers.items()
        ]
        plain: AbstractContextManager[Any] = nullcontext()
        if self.dtype is not None:
            args, kwargs = pytree.tree_map_only(Tensor, self._converted, (args, kwargs))
            plain = torch.autocast(_device_type(self.network), enabled=False)
        if self.network.training:
            self.network.eval()
        axes = Axes((args, kwargs)) if None in layouts.values() else None
        try:
            with plain, axes or nullcontext():
                self.network(*args, **kwargs)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        for name in self.names:
            if name not in found:
                raise RuntimeError(not_run(name, "oracle"))
            if seen[name].changed():
                raise changed_in_place(name, "oracle")
        return found

    def _converted(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x


def _device_type(network: nn.Module) -> str:
    first = next(network.parameters(), None)
    return first.device.type if first is not None else "cpu"


def not_run(name: str, of: str) -> str:
    """Return the message for a layer that a forward has not reached."""
    return (
        f"layers: {name!r} did not run in this forward of the {of}. Name modules that always run."
    )


def ran_twice(name: str, of: str) -> str:
    """Return the message for a layer with two maps in a forward."""
    return f"layers: {name!r} ran twice in one forward of the {of}. Name a module that runs once."


def changed_in_place(name: str, of: str) -> RuntimeError:
    """Return the error for a map that was changed in place after its layer returned it."""
    return RuntimeError(
        f"layers: the {of} changes the output of {name!r} in place later in the forward, by an "
        "activation with inplace=True or by +=. Name the module that does so instead, or use "
        "inplace=False."
    )
