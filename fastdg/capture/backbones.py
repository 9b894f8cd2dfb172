"""Presets: layers of well-known backbones for feature maps."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn


class Preset(NamedTuple):
    """A family of backbones, recognised by the names of its modules.

    Attributes:
        stem: name of the first layer; "": the first block, unless the blocks end in pools.
        blocks: pattern of the names of the blocks. Blocks with one group ``stage`` form a stage.
        stages: whether each block is a stage; otherwise `stage_ends` finds the ends of stages.
    """

    stem: str
    blocks: str
    stages: bool = True


PRESETS = (
    Preset("maxpool", r"layer[1-4]"),  # ResNets of torchvision and timm
    Preset("maxpool", r"stage[2-4]"),  # torchvision: ShuffleNetV2
    Preset("stem", r"stages\.\d+"),  # timm: ResNetV2, ConvNeXt, MobileViT, MaxViT and more
    Preset("stem", r"layers\.\d+"),  # timm: FocalNet
    Preset("stem", r"s[1-4]"),  # timm: RegNet
    Preset("stem", r"trunk_output\.block[1-4]"),  # torchvision: RegNet
    Preset("stem", r"blocks\.\d+", False),  # timm: MLP-Mixer, Xception; torchvision: MaxViT
    Preset("act1", r"blocks\.\d+", False),  # timm: GhostNet
    Preset("bn1", r"blocks\.\d+", False),  # timm: EfficientNet, MobileNet V2 to V4
    Preset("features.pool0", r"features\.denseblock\d+"),  # DenseNets of torchvision and timm
    # torchvision: VGG, MobileNet V2 and V3, EfficientNet, ConvNeXt, Swin; timm: VGG
    Preset("", r"features\.\d+", False),
    Preset("embedder", r"encoder\.stages\.\d+"),  # transformers: ResNet, RegNet
    Preset("patch_embed", r"blocks\.\d+", False),  # timm: ViT and its kind
    Preset("patch_embed", r"layers\.\d+"),  # timm: Swin
    Preset("patch_embed", r"stages\.\d+"),  # timm: PVT v2
    Preset("patch_embeds.0", r"blocks\.(?P<stage>\d+)\.\d+"),  # timm: Twins
    Preset("conv_proj", r"encoder\.layers\.encoder_layer_\d+", False),  # torchvision: ViT
    Preset("embeddings.patch_embeddings", r"(?:layers|encoder\.layer)\.\d+", False),  # ViT, DINOv2
    Preset("embeddings.patch_embeddings", r"encoder\.layers\.\d+"),  # transformers: Swin
    Preset("embeddings", r"encoder\.stages\.\d+"),  # transformers: ConvNeXt
    Preset("embeddings", r"encoder\.blocks\.\d+", False),  # transformers: EfficientNet
    Preset("embeddings.patch_embedding", r"encoder\.layers\.\d+", False),  # transformers: CLIP
    Preset("conv_stem", r"encoder\.layer\.\d+"),  # transformers: MobileViT
    Preset("conv_stem", r"layer\.\d+", False),  # transformers: MobileNet V1 and V2
    Preset("stages.0.patch_embeddings", r"stages\.\d+"),  # transformers: SegFormer since 5
    Preset("encoder.layers.0.patch_embedding", r"encoder\.layers\.\d+"),  # transformers: PVT v2
    # transformers: PVT, and SegFormer before 5
    Preset("encoder.patch_embeddings.0", r"encoder\.block\.(?P<stage>\d+)\.\d+"),
    Preset("conv1", r"transformer\.resblocks\.\d+", False),  # open_clip
)


def preset_of(model: nn.Module) -> list[str]:
    """Return the names of default layers: the stem, and the last block of each stage.

    Raises:
        ValueError: no preset fits, or one fits twice.
    """
    modules = dict(model.named_modules())
    for preset in PRESETS:
        pattern = re.compile(rf"((?:.*\.)?){preset.blocks}")
        blocks: dict[str, dict[str, list[str]]] = {}
        for name in modules:
            if match := pattern.fullmatch(name):
                stage: str = match.groupdict().get("stage") or name
                blocks.setdefault(match[1], {}).setdefault(stage, []).append(name)
        fits = []
        for prefix, found in blocks.items():
            stem = prefix + preset.stem
            ends = [names[-1] for names in found.values()]
            if not preset.stages:
                ends = stage_ends({name: modules[name] for name in ends}, bool(preset.stem))
            if stem in modules and preset.stem:
                ends = [stem, *ends]
            elif preset.stem:
                continue
            fits.append(ends)
        if len(fits) > 1:
            raise ValueError(
                f"layers: the model has several backbones ({fits[0][-1]!r}, {fits[1][-1]!r}, ...). "
                "Pass layers=[...] with names of modules of one of them."
            )
        if fits:
            return fits[0]
    raise ValueError(no_preset(model))


def stage_ends(blocks: dict[str, nn.Module], stem: bool) -> list[str]:
    """Return the last block before each that downsamples; without any, every third block.

    With pools between the blocks (VGG), return the pools. Without a ``stem``, add the first block.
    """
    names = list(blocks)
    pools = [name for name in names if isinstance(blocks[name], nn.MaxPool2d)]
    if pools:
        return [*pools, *names[-1:]] if pools[-1] != names[-1] else pools
    starts = [i for i in range(1, len(names)) if downsamples(blocks[names[i]])]
    ends = [names[i - 1] for i in starts] if starts else names[2:-1:3]
    last = len(names) if starts or len(names) < 3 else len(names) // 3 * 3
    return list(dict.fromkeys([*([] if stem else names[:1]), *ends, names[last - 1]]))


def downsamples(block: nn.Module) -> bool:
    """Return whether a block returns a smaller map: by a stride, or by Swin's patch merging."""
    for module in block.modules():
        stride = getattr(module, "stride", 1)
        strides = stride if isinstance(stride, Sequence) else [stride]
        if any(isinstance(n, int) and n > 1 for n in strides):
            return True
        if type(module).__name__.startswith("PatchMerging"):
            return True
    return False


def no_preset(model: nn.Module) -> str:
    """Return the message for a model without a preset, with a choice of its modules."""
    found: list[str] = []
    pending = list(model.named_children())
    for name, module in pending:  # the children of containers are appended
        inside = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        if inside and len(pending) < 100:
            pending += [(f"{name}.{key}", child) for key, child in module.named_children()]
        elif not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found.append(name)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    found.sort(key=order.__getitem__)
    head = f"layers: no preset for {type(model).__name__}. Pass layers=[...], names of modules"
    if not found:
        return f"{head} whose outputs should stay close to the oracle's; this one contains none."
    layered = [name for name in found if any(True for _ in model.get_submodule(name).parameters())]
    pick = (layered or found)[:-1] or found  # not the head
    some = list(dict.fromkeys(pick[i * (len(pick) - 1) // 2] for i in range(3)))
    more = ", ..." if len(found) > 20 else ""
    return (
        f"{head} whose outputs should stay close to the oracle's, for example layers={some}. "
        f"Its modules: {', '.join(found[:20])}{more}."
    )


def find_layers(model: nn.Module, names: Iterable[str], of: str) -> dict[str, nn.Module]:
    """Return the modules of these names.

    Raises:
        TypeError, ValueError: ``names`` is not a list of distinct names of modules.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"layers: expected a list of names of modules, got {names!r}.")
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"layers: expected names of modules, got {type(name).__name__}.")
        if name not in modules or name == "":
            near = difflib.get_close_matches(name, list(modules)[1:], n=3, cutoff=0.0)
            raise ValueError(f"layers: the {of} has no module {name!r}. Nearest: {near}.")
        if name in found:
            raise ValueError(f"layers: expected distinct names, got {name!r} twice.")
        found[name] = modules[name]
    if not found:
        raise ValueError("layers: expected at least one name, got an empty list.")
    return found
