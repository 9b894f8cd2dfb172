"""Feature maps: which layers of a network have them, how they lie, and what an oracle's are."""

from __future__ import annotations

import copy
import difflib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..statistics.tape import paused
from .sharding import sharded


class Preset(NamedTuple):
    """The layers whose maps to take of a family of backbones.

    Attributes:
        stem: name of what comes first.
        blocks: pattern of the names of what follows.
        every: take each so manieth of these.
    """

    stem: str
    blocks: str
    every: int = 1


PRESETS = (
    Preset("maxpool", r"layer[1-4]"),  # ResNets of torchvision and timm
    Preset("stem", r"stages\.\d+"),  # timm: ResNetV2, ConvNeXt
    Preset("stem", r"s[1-4]"),  # timm: RegNet
    Preset("stem", r"trunk_output\.block[1-4]"),  # torchvision: RegNet
    Preset("embedder", r"encoder\.stages\.\d+"),  # transformers: ResNet, RegNet
    Preset("patch_embed", r"blocks\.\d+", 3),  # timm: ViT and its kind
    Preset("patch_embed", r"layers\.\d+"),  # timm: Swin
    Preset("conv_proj", r"encoder\.layers\.encoder_layer_\d+", 3),  # torchvision: ViT
    Preset("embeddings.patch_embeddings", r"(?:layers|encoder\.layer)\.\d+", 3),  # ViT, DINOv2
    Preset("embeddings.patch_embeddings", r"encoder\.layers\.\d+"),  # transformers: Swin
    Preset("embeddings", r"encoder\.stages\.\d+"),  # transformers: ConvNeXt
    Preset("embeddings.patch_embedding", r"encoder\.layers\.\d+", 3),  # transformers: CLIP
    Preset("conv1", r"transformer\.resblocks\.\d+", 3),  # open_clip
)
# Where a layer says how many channels it returns
_WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "normalized_shape")
# layout -> dimensions of the samples and of the channels
LAYOUTS = {"NC": (0, 1), "NLC": (0, -1), "LNC": (1, -1)}


def preset_of(model: nn.Module) -> list[str]:
    """The layers to take where the user names none, by the names they have.

    Raises:
        ValueError: no preset fits, or one does twice.
    """
    names = [name for name, _ in model.named_modules()]
    for preset in PRESETS:
        pattern = re.compile(rf"((?:.*\.)?){preset.blocks}")
        blocks: dict[str, list[str]] = {}
        for name in names:
            if match := pattern.fullmatch(name):
                blocks.setdefault(match[1], []).append(name)
        fits = [
            [f"{prefix}{preset.stem}", *found[preset.every - 1 :: preset.every]]
            for prefix, found in blocks.items()
            if f"{prefix}{preset.stem}" in names and len(found) >= preset.every
        ]
        if len(fits) > 1:
            raise ValueError(
                f"layers: the model has several backbones ({fits[0][1]!r}, {fits[1][1]!r}, ...); "
                "name the layers"
            )
        if fits:
            return fits[0]
    children = [name for name, _ in model.named_children()]
    raise ValueError(
        f"layers: {type(model).__name__} is no backbone that a preset is known for; name the "
        f"layers whose outputs shall stay close to the oracle's (the model has {children[:12]})"
    )


def find_layers(model: nn.Module, names: Iterable[str], of: str) -> dict[str, nn.Module]:
    """The modules of these names.

    Raises:
        TypeError, ValueError: ``names`` is not a list of different names of modules.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"layers: expected a list of names of modules, got {names!r}")
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"layers: expected names of modules, got {type(name).__name__}")
        if name not in modules or name == "":
            near = difflib.get_close_matches(name, list(modules)[1:], n=3, cutoff=0.0)
            raise ValueError(f"layers: the {of} has no module {name!r}; nearest: {near}")
        if name in found:
            raise ValueError(f"layers: {name!r} stands there twice")
        found[name] = modules[name]
    if not found:
        raise ValueError("layers: expected at least one name, got an empty list")
    return found


def map_of(name: str, output: Any) -> Tensor:
    """The feature map among what a layer returned: itself, or the first tensor in it."""
    leaves = [output] if isinstance(output, Tensor) else pytree.tree_leaves(output)
    tensor = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if tensor is None or tensor.dim() < 2 or not tensor.is_floating_point():
        what = type(output).__name__ if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"layers: {name!r} returned {what}, which is no feature map (N, C, ...)")
    return tensor


def layout_of(name: str, layer: nn.Module, shape: torch.Size, samples: int) -> str:
    """How the dimensions of a map lie, from the layer's widths and the number of samples.

    Raises:
        ValueError: it cannot be told.
    """
    late = len(shape) == 3  # tokens, unless the layer's widths say otherwise
    for width in _widths(layer):
        if (shape[1] == width) != (shape[-1] == width):
            late = shape[-1] == width
            break
    if len(shape) == 2 or not late:
        return "NC"
    if len(shape) > 3 or (shape[0] == samples and shape[1] != samples):
        return "NLC"
    if shape[1] == samples and shape[0] != samples:
        return "LNC"
    raise ValueError(
        f"layouts: which dimension of the map {tuple(shape)} of {name!r} has the {samples} samples "
        f"cannot be told; pass layouts={{{name!r}: 'NLC'}}, or 'LNC' if the tokens come first, or "
        "'NC' if the channels are in dimension 1"
    )


def _widths(layer: nn.Module) -> Iterator[int]:
    """How many channels the layers inside return, from the last one on."""
    for module in reversed(list(layer.modules())):
        for name in _WIDTHS:
            width = getattr(module, name, None)
            if isinstance(width, Sequence):
                width = width[-1]
            if isinstance(width, int):
                yield width


def check_layouts(layouts: Any, names: Iterable[str]) -> dict[str, str]:
    """Layer -> layout, of the layers for which it was given."""
    names = list(names)
    if isinstance(layouts, str):
        layouts = dict.fromkeys(names, layouts)
    if not isinstance(layouts, Mapping):
        raise TypeError(
            f"layouts: expected one of {list(LAYOUTS)} or a mapping from layers to these, got "
            f"{type(layouts).__name__}"
        )
    for name, layout in layouts.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.0)
            raise ValueError(f"layouts: {name!r} is none of the layers; nearest: {near}")
        if layout not in LAYOUTS:
            raise ValueError(f"layouts: expected one of {list(LAYOUTS)}, got {layout!r}")
    return dict(layouts)


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
                "oracle: it is the model itself, which training changes; leave it out for a copy "
                "of the model as it is now"
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

    @torch.no_grad()
    def maps(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Layer -> its map of this input."""
        found: dict[str, Tensor] = {}

        def see(name: str, output: Any) -> None:
            if name in found:
                raise RuntimeError(f"layers: {name!r} ran twice in one forward of the oracle")
            found[name] = map_of(name, output)
            versions[name] = found[name]._version
            if len(found) == len(self.names):
                raise _Enough

        versions: dict[str, int] = {}
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
        try:
            with paused(), plain:
                self.network(*args, **kwargs)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        for name in self.names:
            if name not in found:
                raise RuntimeError(f"layers: {name!r} did not run in the oracle's forward")
            if found[name]._version != versions[name]:
                raise changed_in_place(name, "oracle")
        return found

    def _converted(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x


def _device_type(network: nn.Module) -> str:
    first = next(network.parameters(), None)
    return first.device.type if first is not None else "cpu"


def changed_in_place(name: str, of: str) -> RuntimeError:
    """What to raise if a map is not any more what it was when its layer returned it."""
    return RuntimeError(
        f"layers: the {of} changes the output of {name!r} in place later in the forward (an "
        "activation with inplace=True, or +=); name the layer that does so in its place, or make "
        "that operation out of place"
    )
