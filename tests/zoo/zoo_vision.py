"""Families of timm and torchvision: a small model of each, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo_cases import Case, N, each_of, tensor_of, words

# One of nearly every family, the small ones first: where time is short, the large ones are not run.
TIMM = words(
    "test_vit test_vit_relpos test_resnet test_convnext test_convnext2 test_byobnet "
    "test_efficientnet test_efficientnet_evos test_nfnet test_mambaout beit_base_patch16_224 "
    "deit_tiny_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 vit_relpos_small_patch16_224 "
    "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 davit_tiny "
    "samvit_base_patch16 hiera_tiny_224 twins_svt_small twins_pcpvt_small "
    "tnt_s_legacy_patch16_224 xcit_nano_12_p16_224 "
    "convit_tiny lcnet_050 mobilenetv3_small_050 "
    "tinynet_e mobilevit_xxs mobilevitv2_050 ghostnet_050 repghostnet_050 edgenext_xx_small "
    "dla46x_c ese_vovnet19b_slim_dw efficientvit_b0 efficientvit_m0 mnasnet_small "
    "mobilenetv4_conv_small regnetx_002 regnety_002 cspnext_tiny cs3darknet_focus_s iformer_t "
    "fasternet_t0 starnet_s050 lcnetv2_small swiftformer_xs efficientformerv2_s0 "
    "inception_next_atto fastvit_t8 convnext_atto convnextv2_atto pvt_v2_b0 mobileone_s1 "
    "repvit_m0_9 pit_ti_224 tiny_vit_5m_224 cpubone_nano shvit_s1 efficientvim_m1 rexnet_100 "
    "coat_tiny levit_128s hardcorenas_b hgnetv2_b0 crossvit_9_240 densenet121 dpn68 "
    "botnet26t_256 visformer_tiny coatnet_pico_rw_224 resnetv2_18 legacy_seresnet18 skresnet18 "
    "hrnet_w18_small poolformer_s12 efficientformer_l1 gcvit_xxtiny lambda_resnet26t"
)
# Where a constructor lets them, they are made thinner and shallower.
WIDTHS = (16, 32, 48, 64)
SHALLOW = {"depths": (1, 1, 1, 1)}
THIN = {"depth": 2, "embed_dim": 48, "num_heads": 3}
OWN: dict[str, dict[str, Any]] = {
    **each_of(
        ("beit_base_patch16_224", "deit_tiny_patch16_224", "eva02_tiny_patch14_224",
         "cait_xxs24_224", "vit_relpos_small_patch16_224", "samvit_base_patch16",
         "xcit_nano_12_p16_224"),
        THIN,
    ),
    **each_of(
        ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"),
        {"embed_dim": 24, "num_heads": (1, 2, 4, 8), **SHALLOW},
    ),
    "davit_tiny": {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), **SHALLOW},
    "hiera_tiny_224": {"embed_dim": 24, "stages": (1, 1, 2, 1)},
    "twins_svt_small": {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), **SHALLOW},
    "twins_pcpvt_small": {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), **SHALLOW},
    "tnt_s_legacy_patch16_224": {"depth": 2, "embed_dim": 48},
    "convit_tiny": {"depth": 2, "embed_dim": 48, "local_up_to_layer": 1},
    **each_of(
        ("convnext_atto", "convnextv2_atto", "inception_next_atto"), {"dims": WIDTHS, **SHALLOW}
    ),
    **each_of(("resnetv2_18", "skresnet18"), {"channels": WIDTHS}),
    **each_of(("pvt_v2_b0", "tiny_vit_5m_224"), SHALLOW),
    **each_of(("fastvit_t8", "legacy_seresnet18"), {"layers": (1, 1, 1, 1)}),
    **each_of(("pit_ti_224", "visformer_tiny", "shvit_s1"), {"depth": (1, 1, 1)}),
    "crossvit_9_240": {"embed_dim": (32, 64), "num_heads": (2, 2)},
    "coat_tiny": {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1},
    "coatnet_pico_rw_224": {"embed_dim": (16, 32, 48), "depths": (1, 1, 1)},
    "densenet121": {"block_config": (2, 2, 2, 2), "growth_rate": 8},
    "dpn68": {"k_sec": (1, 1, 1, 1)},
    "efficientformerv2_s0": {"embed_dims": WIDTHS, **SHALLOW},
    "efficientvim_m1": {"embed_dim": (16, 32, 48), "depths": (1, 1, 1)},
    "fasternet_t0": {"embed_dim": 16, **SHALLOW},
    "levit_128s": {"embed_dim": (16, 32, 48), "depth": (1, 1, 1)},
    "repvit_m0_9": {"embed_dim": WIDTHS, "depth": (1, 1, 1, 1)},
    "rexnet_100": {"width_mult": 0.3},
    "swiftformer_xs": {"embed_dims": WIDTHS, "layers": (1, 1, 1, 1)},
}  # fmt: skip
# Made by their classes: module, class, arguments.
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "FocalNet": ("focalnet", "FocalNet", {"embed_dim": 24, **SHALLOW}),
    "ConvMixer": ("convmixer", "ConvMixer", {"dim": 32, "depth": 2}),
    "MlpMixer": ("mlp_mixer", "MlpMixer", {"num_blocks": 2, "embed_dim": 48}),
    "poolformer_s12": ("metaformer", "MetaFormer", {"dims": WIDTHS, **SHALLOW}),
    "gcvit_xxtiny": (
        "gcvit",
        "GlobalContextVit",
        {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "embed_dim": 16},
    ),
    "efficientformer_l1": (
        "efficientformer",
        "EfficientFormer",
        {"depths": (1, 1, 1, 2), "embed_dims": WIDTHS, "num_vit": 1},
    ),
    "VOLO": (
        "volo",
        "VOLO",
        {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)},
    ),
}
TORCHVISION = words(
    "squeezenet1_1 shufflenet_v2_x0_5 mnasnet0_5 mobilenet_v3_small mobilenet_v2 "
    "efficientnet_b0 regnet_x_400mf regnet_y_400mf densenet121 googlenet resnet18 "
    "lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large s3d mc3_18 swin_t convnext_tiny "
    "resnet50 vit_b_16"
)
# Made by their classes, smaller: module, class, arguments.
TORCHVISION_CLASSES: dict[str, tuple[str, str, Callable[[Any], tuple[Any, ...]]]] = {
    "convnext_tiny": (
        "convnext",
        "ConvNeXt",
        lambda models: (
            [
                models.convnext.CNBlockConfig(8, 16, 1),
                models.convnext.CNBlockConfig(16, 24, 1),
                models.convnext.CNBlockConfig(24, None, 2),
            ],
        ),
    ),
    "densenet121": ("densenet", "DenseNet", lambda models: (8, (2, 2, 2, 2), 16)),
    "resnet50": ("resnet", "ResNet", lambda models: (models.resnet.Bottleneck, [1, 1, 1, 1])),
    "swin_t": (
        "swin_transformer",
        "SwinTransformer",
        lambda models: ([4, 4], 12, [2, 2, 2], [2, 2, 4], [4, 4]),
    ),
    "vit_b_16": ("vision_transformer", "VisionTransformer", lambda models: (64, 16, 2, 2, 24, 32)),
}
VIDEO = {"s3d": (16, 64), "mc3_18": (8, 32)}  # frames, and their size
# Of those that go down by 32, what is left is then 2 x 2.
SIZES = (64, 96, 120, 128, 224, 256)
LARGEST = 13_000_000  # parameters: the gradients of all samples are held in float64


def first_that_runs(make: Callable[[int], nn.Module]) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model and images of the smallest size that it takes."""
    reason: Exception | None = None
    for size in SIZES:
        try:
            model = make(size)
            too_large(model)
            draw_zeros(model)
            x = torch.randn(N, 3, size, size)
            with torch.no_grad():
                model.eval()(x[:2])
        except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:  # noqa: PERF203
            reason = reason or error
        else:
            return model, partial(run_on, model, x)
    raise ValueError(f"takes none of the sizes {SIZES}: {reason}")


@torch.no_grad()
def draw_zeros(model: nn.Module) -> None:
    """Draw the parameters that start at nothing, as layer scales, biases and the weight of the last
    norm of a block may: they hide what lies below them."""
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and float(p.abs().max()) < 1e-3:
            p.normal_(0, 0.1)


def run_on(model: nn.Module, x: Tensor) -> Tensor:
    return tensor_of(model(x))


def too_large(model: nn.Module) -> None:
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST:
        raise TooLarge(f"{count / 1e6:.0f} million parameters")


class TooLarge(Exception):
    """A model of more parameters than the zoo takes."""


def from_timm(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    timm = importlib.import_module("timm")

    def make(size: int) -> nn.Module:
        if name in CLASSES:
            module, kind, given = CLASSES[name]
            if name in ("MlpMixer", "VOLO", "gcvit_xxtiny"):
                given = given | {"img_size": size}
            made = getattr(importlib.import_module(f"timm.models.{module}"), kind)
            return made(num_classes=5, **given)
        try:
            return timm.create_model(name, num_classes=5, img_size=size, **OWN.get(name, {}))
        except TypeError:  # a model for images of any size
            return timm.create_model(name, num_classes=5, **OWN.get(name, {}))

    return first_that_runs(make)


def from_torchvision(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    models = importlib.import_module("torchvision.models")
    if name in TORCHVISION_CLASSES:
        module, kind, arguments = TORCHVISION_CLASSES[name]
        made = getattr(importlib.import_module(f"torchvision.models.{module}"), kind)
        return first_that_runs(lambda size: made(*arguments(models), num_classes=5))
    given: dict[str, Any] = {"weights": None, "num_classes": 5}
    if name == "googlenet":
        given["init_weights"] = False
    if name.endswith("v3_large"):
        given["weights_backbone"] = None

    if name not in VIDEO:
        return first_that_runs(lambda size: models.get_model(name, **given))
    model = models.get_model(name, **given)
    if name == "s3d":
        model.avgpool = nn.AvgPool3d(2, 1)  # its own is of frames of 224
    too_large(model)
    draw_zeros(model)
    frames, size = VIDEO[name]
    x = torch.randn(N, 3, frames, size, size)
    return model, lambda: tensor_of(model(x))


def cases() -> list[Case]:
    """All of them."""
    timm = dict.fromkeys([*CLASSES, *TIMM])
    out = [Case("timm", name, partial(from_timm, name)) for name in timm]
    return out + [
        Case("torchvision", name, partial(from_torchvision, name)) for name in TORCHVISION
    ]
