"""MIRO on small backbones of torchvision, timm and transformers: layers, channels, a step.

Their sizes coincide on purpose: rows, tokens and samples are as many as channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import close
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils import _pytree as pytree

import fastdg
from fastdg.capture.backbones import preset_of
from fastdg.capture.feature_maps import Oracle

Make = Callable[[Any], nn.Module]
FIRST, LAST = "first", "last"  # where a map has its channels
# name -> (package, make, size of the images, layers, where their channels are)
Case = tuple[str, Make, int, list[str], str]
STAGES = [f"layer{i}" for i in range(1, 5)]


def vgg(models: Any) -> nn.Module:
    with torch.device("meta"):
        model = models.vgg.VGG(nn.Identity(), init_weights=False)
    model.features = models.vgg.make_layers([4, "M", 8, "M", 8, "M", 8, "M", 8, "M"], True)
    model.classifier = nn.Linear(8 * 49, 3)
    return model


def convnext(models: Any) -> nn.Module:
    block = models.convnext.CNBlockConfig
    blocks = [block(8, 16, 1), block(16, 16, 1), block(16, 16, 1), block(16, None, 1)]
    return models.convnext.ConvNeXt(blocks, num_classes=3)


def hf(kind: str, **settings: Any) -> Make:
    """A network of transformers from its configuration."""

    def make(library: Any) -> nn.Module:
        config = getattr(library, f"{kind}Config")(num_labels=3, **settings)
        return getattr(library, f"{kind}ForImageClassification")(config)

    return make


def timm(name: str, **settings: Any) -> Make:
    return lambda library: library.create_model(name, num_classes=3, **settings)


def numbered(pattern: str, *numbers: int) -> list[str]:
    return [pattern.format(i) for i in numbers]


FOUR = range(4)
HIDDEN = {"hidden_sizes": [8, 16, 16, 24], "depths": [1] * 4}
HEADS = {"num_attention_heads": [1] * 4}
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 6}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2]}
TIMM_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 1)}
TV, TM, HF = "torchvision.models", "timm", "transformers"
CASES: dict[str, Case] = {
    "torchvision ResNet": (
        TV,
        lambda m: m.ResNet(m.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3),
        32,
        ["maxpool", *STAGES],
        FIRST,
    ),
    "torchvision VGG": (TV, vgg, 32, numbered("features.{}", 3, 7, 11, 15, 19), FIRST),
    "torchvision DenseNet": (
        TV,
        lambda m: m.DenseNet(4, (1, 1, 1, 1), 8, num_classes=3),
        32,
        ["features.pool0", *numbered("features.denseblock{}", 1, 2, 3, 4)],
        FIRST,
    ),
    "torchvision MobileNet V2": (
        TV,
        lambda m: m.mobilenet_v2(num_classes=3, width_mult=0.25),
        32,
        numbered("features.{}", 0, 1, 3, 6, 13, 18),
        FIRST,
    ),
    "torchvision MobileNet V3": (
        TV,
        lambda m: m.mobilenet_v3_small(num_classes=3, width_mult=0.25),
        32,
        numbered("features.{}", 0, 1, 3, 8, 12),
        FIRST,
    ),
    "torchvision EfficientNet": (
        TV,
        lambda m: m.efficientnet_b0(num_classes=3),
        32,
        numbered("features.{}", 0, 1, 2, 3, 5, 8),
        FIRST,
    ),
    "torchvision ConvNeXt": (TV, convnext, 32, numbered("features.{}", 0, 1, 3, 5, 7), FIRST),
    "torchvision Swin": (
        TV,
        lambda m: m.SwinTransformer([2, 2], 16, [1, 2], [1, 2], [4, 4], num_classes=3),
        32,
        numbered("features.{}", 0, 1, 3),
        LAST,
    ),
    "torchvision RegNet": (
        TV,
        lambda m: m.regnet_y_400mf(num_classes=3),
        32,
        ["stem", *numbered("trunk_output.block{}", 1, 2, 3, 4)],
        FIRST,
    ),
    "torchvision ShuffleNet": (
        TV,
        lambda m: m.shufflenet_v2_x0_5(num_classes=3),
        32,
        ["maxpool", *numbered("stage{}", 2, 3, 4)],
        FIRST,
    ),
    "torchvision ViT": (
        TV,
        lambda m: m.VisionTransformer(32, 8, 6, 2, 16, 32, num_classes=3),
        32,
        ["conv_proj", *numbered("encoder.layers.encoder_layer_{}", 2, 5)],
        "conv, then tokens",
    ),
    "timm VGG": (
        TM,
        lambda m: m.models.vgg.VGG([4, "M", 8, "M", 8, "M"], num_classes=3, mlp_ratio=0.01),
        32,
        numbered("features.{}", 2, 5, 8),
        FIRST,
    ),
    "timm DenseNet": (
        TM,
        timm("densenet121", growth_rate=4, block_config=(1, 1, 1, 1)),
        32,
        ["features.pool0", *numbered("features.denseblock{}", 1, 2, 3, 4)],
        FIRST,
    ),
    "timm MobileNet V2": (
        TM,
        timm("mobilenetv2_035"),
        32,
        ["bn1", *numbered("blocks.{}", 0, 1, 2, 4, 6)],
        FIRST,
    ),
    "timm MobileNet V3": (
        TM,
        timm("mobilenetv3_small_050"),
        32,
        ["bn1", *numbered("blocks.{}", 0, 1, 3, 5)],
        FIRST,
    ),
    "timm EfficientNet": (
        TM,
        timm("efficientnet_lite0"),
        32,
        ["bn1", *numbered("blocks.{}", 0, 1, 2, 4, 6)],
        FIRST,
    ),
    "timm ConvNeXt": (
        TM,
        timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 24)),
        32,
        ["stem", *numbered("stages.{}", *FOUR)],
        FIRST,
    ),
    "timm Swin": (
        TM,
        timm("swin_tiny_patch4_window7_224", num_heads=(1, 1), window_size=4, **TIMM_SWIN),
        32,
        ["patch_embed", "layers.0", "layers.1"],
        LAST,
    ),
    "timm Swin V2": (
        TM,
        timm("swinv2_tiny_window8_256", num_heads=(1, 1), window_size=4, **TIMM_SWIN),
        32,
        ["patch_embed", "layers.0", "layers.1"],
        LAST,
    ),
    "timm MobileViT": (
        TM,
        timm("mobilevit_xxs"),
        64,
        ["stem", *numbered("stages.{}", *range(5))],
        FIRST,
    ),
    "timm ViT": (
        TM,
        timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=6, num_heads=2),
        32,
        ["patch_embed", "blocks.2", "blocks.5"],
        LAST,
    ),
    "timm MLP-Mixer": (
        TM,
        lambda m: m.models.mlp_mixer.MlpMixer(3, 32, patch_size=8, embed_dim=16, num_blocks=3),
        32,
        ["stem", "blocks.2"],
        LAST,
    ),
    "timm PVT v2": (
        TM,
        timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
        32,
        ["patch_embed", *numbered("stages.{}", *FOUR)],
        "tokens, then conv",
    ),
    "transformers ResNet": (
        HF,
        hf("ResNet", embedding_size=8, **HIDDEN),
        32,
        ["resnet.embedder", *numbered("resnet.encoder.stages.{}", *FOUR)],
        FIRST,
    ),
    "transformers ConvNeXt": (
        HF,
        hf("ConvNext", **HIDDEN),
        32,
        ["convnext.embeddings", *numbered("convnext.encoder.stages.{}", *FOUR)],
        FIRST,
    ),
    # Its first stage leaves 64 tokens of 32 channels, and ends in a norm of 64
    "transformers Swin": (
        HF,
        hf("Swin", window_size=4, **SWIN),
        32,
        ["swin.embeddings.patch_embeddings", *numbered("swin.encoder.layers.{}", 0, 1)],
        LAST,
    ),
    "transformers Swin V2": (
        HF,
        hf("Swinv2", window_size=4, **SWIN),
        32,
        ["swinv2.embeddings.patch_embeddings", *numbered("swinv2.encoder.layers.{}", 0, 1)],
        LAST,
    ),
    "transformers ViT": (
        HF,
        hf("ViT", num_attention_heads=2, **VIT),
        32,
        ["vit.embeddings.patch_embeddings", *numbered("vit.layers.{}", 2, 5)],
        LAST,
    ),
    "transformers DINOv2": (
        HF,
        hf("Dinov2", num_attention_heads=2, **VIT),
        32,
        ["dinov2.embeddings.patch_embeddings", *numbered("dinov2.encoder.layer.{}", 2, 5)],
        LAST,
    ),
    "transformers SegFormer": (
        HF,
        hf("Segformer", decoder_hidden_size=8, **HIDDEN, **HEADS),
        32,
        ["segformer.stages.0.patch_embeddings", *numbered("segformer.stages.{}", *FOUR)],
        "tokens, then conv",
    ),
    "transformers MobileViT": (
        HF,
        hf(
            "MobileViT",
            image_size=64,
            hidden_sizes=[8, 8, 8],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2,
        ),
        64,
        ["mobilevit.conv_stem", *numbered("mobilevit.encoder.layer.{}", *range(5))],
        FIRST,
    ),
    "transformers PVT": (
        HF,
        hf("Pvt", image_size=32, **HIDDEN, **HEADS),
        32,
        ["pvt.encoder.patch_embeddings.0", *numbered("pvt.encoder.block.{}.0", *FOUR)],
        LAST,
    ),
    "transformers PVT v2": (
        HF,
        hf("PvtV2", image_size=32, **HIDDEN, **HEADS),
        32,
        [
            "pvt_v2.encoder.layers.0.patch_embedding",
            *numbered("pvt_v2.encoder.layers.{}", *FOUR),
        ],
        LAST,
    ),
    "transformers MobileNet V2": (
        HF,
        hf("MobileNetV2", depth_multiplier=0.25),
        32,
        ["mobilenet_v2.conv_stem", *numbered("mobilenet_v2.layer.{}", 1, 4, 11, 15)],
        FIRST,
    ),
}


def frozen(model: nn.Module) -> nn.Module:
    """In training mode, batch norm and dropout not."""
    model.train()
    for module in model.modules():
        kind = type(module).__name__  # each library has a stochastic depth of its own
        if "BatchNorm" in kind or "Drop" in kind or "StochasticDepth" in kind:
            module.eval()
    return model


def maps_of(model: nn.Module, layers: list[str], x: Tensor) -> list[Tensor]:
    """The first tensor that each layer returns."""
    found: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, i, out: found.append(
                next(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
            )
        )
        for name in layers
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out if isinstance(out, Tensor) else out.logits, y, reduction="none")


def channel_of(where: str, map_: Tensor) -> int:
    if where == FIRST or map_.dim() == 2:
        return 1
    if where == LAST:
        return map_.dim() - 1
    # A ViT's patch embedding is a convolution; a PVT's are tokens, its stages are not
    tokens = map_.dim() == 3 or map_.shape[1] == map_.shape[2] != map_.shape[3]
    return map_.dim() - 1 if tokens else 1


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", CASES)
def test_a_step(name: str) -> None:
    package, make, size, layers, where = CASES[name]
    library = pytest.importorskip(package)
    if package == HF and int(library.__version__.split(".")[0]) < 5:
        pytest.skip("transformers before 5 has other names")
    model = frozen(make(library))
    small = sum(p.numel() for p in model.parameters()) < 1_000_000
    model = model.double() if small else model
    opt = fastdg.MIRO(SGD(model.parameters(), lr=0.01), model, weight=0.5)
    assert opt.layers == layers
    x, y = torch.randn(4, 3, size, size).to(next(model.parameters()).dtype), torch.arange(4) % 3
    with torch.no_grad():
        oracles = maps_of(model, layers, x)
        for p in model.parameters():
            p.mul_(1 + 0.1 * torch.randn_like(p))
        maps = maps_of(model, layers, x)
    model(x)  # the variances have a size now
    reg = torch.zeros((), dtype=x.dtype)
    for f, f0, b in zip(maps, oracles, opt.biases.values(), strict=True):
        channel = channel_of(where, f)
        assert len(b) == f.shape[channel]
        b.data = torch.linspace(-3, 0, len(b)).to(b)
        s = (F.softplus(b.detach()) + 1e-5).view(
            [-1 if d == channel else 1 for d in range(f.dim())]
        )
        reg = reg + 0.5 * ((f - f0).square() / s + s.log()).mean()
    opt.backward(losses_of(model, x, y), y % 2)
    opt.step()
    close(opt.statistics["miro"], reg, 1e-11 if small else 1e-4)
    used = [p for p in model.parameters() if p.grad is not None]
    assert used and all(p.grad.isfinite().all() for p in used if p.grad is not None)
    assert all(b.grad is not None and b.grad.abs().sum() > 0 for b in opt.biases.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torchvision ConvNeXt", "timm Swin", "transformers PVT"])
def test_domains_of_it(name: str) -> None:
    """AgrSum around it runs, on libraries whose layers it can follow."""
    package, make, size, _, _ = CASES[name]
    library = pytest.importorskip(package)
    if package == HF and int(library.__version__.split(".")[0]) < 5:
        pytest.skip("transformers before 5 has other names")
    model = frozen(make(library))
    opt = fastdg.AgrSum(fastdg.MIRO(SGD(model.parameters(), lr=0.01), model), num_domains=2)
    x, y = torch.randn(4, 3, size, size), torch.arange(4) % 3
    for _ in range(2):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            losses = losses_of(model, x, y)
        opt.zero_grad()
        opt.backward(losses, torch.arange(4) % 2)
        opt.step()
    assert opt.statistics["miro"].isfinite()


@pytest.mark.filterwarnings("ignore")
def test_a_large_swin() -> None:
    """Swin-B at 512 pixels: its second stage returns 1024 tokens and ends in a norm of 1024."""
    library = pytest.importorskip("transformers")
    settings = {"embed_dim": 128, "depths": [2, 2, 2, 2], "num_heads": [4, 8, 16, 32]}
    with torch.device("meta"):
        model = library.SwinModel(library.SwinConfig(image_size=512, window_size=8, **settings))
        layers = preset_of(model)
        layouts: dict[str, Any] = dict.fromkeys(layers)
        maps = Oracle(None, model, layers, None).maps((torch.empty(8, 3, 512, 512),), {}, layouts)
    assert maps[layers[2]].shape == (8, 1024, 512)
    assert list(layouts.values()) == [(0, 2)] * 5
