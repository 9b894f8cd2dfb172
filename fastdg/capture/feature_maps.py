"""Feature maps: how their dimensions lie, and those of an oracle."""

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
    """The feature map among what a layer returned: itself, or the first tensor in it."""
    leaves = [output] if isinstance(output, Tensor) else pytree.tree_leaves(output)
    tensor = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if tensor is None or tensor.dim() < 2 or not tensor.is_floating_point():
        what = type(output).__name__ if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"layers: {name!r} returned {what}, which is no feature map (N, C, ...)")
    return tensor


def layout_of(name: str, axes: Axes, features: Tensor) -> Layout:
    """The dimensions of a map's samples and channels, as ``axes`` has followed them.

    Raises:
        ValueError: they cannot be told.
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
        "a pair (sample dimension, channel dimension)"
    )


def check_layouts(layouts: Any, names: Iterable[str]) -> dict[str, Layout]:
    """Layer -> layout, of the layers for which it was given."""
    names = list(names)
    known = f"one of {list(LAYOUTS)} or a pair (sample dimension, channel dimension)"
    if isinstance(layouts, (str, tuple)):
        layouts = dict.fromkeys(names, layouts)
    if not isinstance(layouts, Mapping):
        raise TypeError(
            f"layouts: expected {known}, or a mapping from layers to these, got "
            f"{type(layouts).__name__}"
        )
    found: dict[str, Layout] = {}
    for name, layout in layouts.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
            raise ValueError(f"layouts: {name!r} is none of the layers; nearest: {near}")
        pair = LAYOUTS.get(layout, layout) if isinstance(layout, str) else layout
        if not (
            isinstance(pair, tuple) and [type(d) for d in pair] == [int, int] and pair[0] != pair[1]
        ):
            raise ValueError(f"layouts: expected {known}, got {layout!r}")
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
            "dimension, channel dimension)}"
        )


class _Enough(BaseException):
    """All maps were seen: the rest of the forward is not needed."""


class Oracle:
    """A frozen network, asked for feature maps.

    Args:
        network: it; None: a copy of ``model`` as it is now. It is put into evaluation mode.
        model: the network in training.
        names: the layers.
        dtype: what to convert it to, and its inputs; None: as it is.
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
                    f"oracle: the model cannot be copied ({error}); pass oracle= another instance "
                    "with the pre-trained weights"
                ) from error
            network.requires_grad_(False)
        if not isinstance(network, nn.Module):
            raise TypeError(f"oracle: expected an nn.Module, got {type(network).__name__}")
        if network is model:
            raise ValueError(
                "oracle: got the model itself, which training changes. Leave it out for a copy of "
                "the model as it is now"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point dtype or None, got {dtype}")
        self.network = network if dtype is None else network.to(dtype)
        self.names, self.dtype = list(names), dtype
        find_layers(self.network, self.names, "oracle")
        self.check_device(model)

    def check_device(self, model: nn.Module) -> None:
        """Raise ValueError unless it lies where the model does."""
        own, other = (next(net.parameters(), None) for net in (self.network, model))
        if own is not None and other is not None and own.device != other.device:
            raise ValueError(
                f"oracle: it is on {own.device}, but the model is on {other.device}; move the "
                "model before the wrapper is made, or the oracle along with it: "
                f"opt.oracle.to({str(other.device)!r})"
            )

    @torch.no_grad()
    def fingerprint(self) -> int:
        """A checksum of what it saves; the same on every device and every rank."""
        found = 1  # 0 is that of no oracle
        for tensor in self.network.state_dict().values():
            dense = type(tensor) is Tensor and tensor.layout == torch.strided
            if dense or sharded(tensor):  # no quantised ones
                whole = tensor.full_tensor() if sharded(tensor) else tensor
                octets = whole.cpu().contiguous().flatten().view(torch.uint8)
                found = zlib.crc32(octets.numpy(), found)
        return found

    def recognise(self, group: dict[str, Any], key: str, steps: int) -> None:
        """Note in a parameter group which oracle a run has, and warn if it had another before."""
        before, group[key] = group.get(key, 0), self.fingerprint()
        if before not in (0, group[key]):
            warn_user(
                f"oracle: the loaded run made its {steps} steps with another oracle, or another "
                "dtype= of it. Make the wrapper from the same pre-trained weights before the model "
                "loads its own, or pass the network that has them as oracle="
            )

    @torch.no_grad()
    def maps(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], layouts: dict[str, Layout | None]
    ) -> dict[str, Tensor]:
        """Layer -> its map of this input. Fills in the ``layouts`` that are None."""
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
    """The error for a layer that a forward has not reached."""
    return f"layers: {name!r} did not run in this forward of the {of}. Name modules that always run"


def ran_twice(name: str, of: str) -> str:
    """The error for a layer with two maps in a forward."""
    return f"layers: {name!r} ran twice in one forward of the {of}. Name a module that runs once"


def changed_in_place(name: str, of: str) -> RuntimeError:
    """What to raise if a map is not any more what it was when its layer returned it."""
    return RuntimeError(
        f"layers: the {of} changes the output of {name!r} in place later in the forward, by an "
        "activation with inplace=True or by +=. Name the module that does so instead, or use "
        "inplace=False"
    )
