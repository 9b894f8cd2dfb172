"""MIRO: layers found, and what it refuses."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import batches, net
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg
from fastdg.capture.backbones import preset_of


def tree(*names: str) -> nn.Module:
    """A module with modules of these names."""
    root = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        here = root
        for parent in parents:
            if not hasattr(here, parent):
                here.add_module(parent, nn.Module())
            here = getattr(here, parent)
        here.add_module(last, nn.Identity())
    return root


STAGES = ["layer1", "layer2", "layer3", "layer4"]
BACKBONES: dict[str, tuple[list[str], list[str]]] = {
    "torchvision and timm ResNet": (
        ["conv1", "bn1", "maxpool", *STAGES, "fc"],
        ["maxpool", *STAGES],
    ),
    "a ResNet inside": (
        [f"backbone.{name}" for name in ("maxpool", *STAGES)],
        [f"backbone.{name}" for name in ("maxpool", *STAGES)],
    ),
    "timm ResNetV2": (
        ["stem.conv", *(f"stages.{i}.blocks.{j}" for i in range(4) for j in range(2)), "head"],
        ["stem", *(f"stages.{i}" for i in range(4))],
    ),
    "timm RegNet": (
        ["stem.conv", *(f"s{i}.b1" for i in range(1, 5))],
        ["stem", *(f"s{i}" for i in range(1, 5))],
    ),
    "torchvision RegNet": (
        ["stem.0", *(f"trunk_output.block{i}.a" for i in range(1, 5))],
        ["stem", *(f"trunk_output.block{i}" for i in range(1, 5))],
    ),
    "transformers ResNet": (
        ["resnet.embedder.pooler", *(f"resnet.encoder.stages.{i}.layers.0" for i in range(4))],
        ["resnet.embedder", *(f"resnet.encoder.stages.{i}" for i in range(4))],
    ),
    "timm ViT": (
        ["patch_embed.proj", *(f"blocks.{i}.mlp.fc1" for i in range(12)), "norm", "head"],
        ["patch_embed", *(f"blocks.{i}" for i in (2, 5, 8, 11))],
    ),
    "timm Swin": (
        ["patch_embed.proj", *(f"layers.{i}.blocks.0.mlp" for i in range(4)), "norm", "head"],
        ["patch_embed", *(f"layers.{i}" for i in range(4))],
    ),
    "torchvision ViT": (
        ["conv_proj", *(f"encoder.layers.encoder_layer_{i}.ln_1" for i in range(12))],
        ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11))],
    ),
    "transformers ViT": (
        ["vit.embeddings.patch_embeddings", *(f"vit.encoder.layer.{i}.output" for i in range(6))],
        ["vit.embeddings.patch_embeddings", "vit.encoder.layer.2", "vit.encoder.layer.5"],
    ),
    "transformers ViT since 5": (
        ["vit.embeddings.patch_embeddings", *(f"vit.layers.{i}.output" for i in range(6))],
        ["vit.embeddings.patch_embeddings", "vit.layers.2", "vit.layers.5"],
    ),
    "transformers Swin": (
        ["swin.embeddings.patch_embeddings", *(f"swin.encoder.layers.{i}.a" for i in range(4))],
        ["swin.embeddings.patch_embeddings", *(f"swin.encoder.layers.{i}" for i in range(4))],
    ),
    "transformers ConvNeXt": (
        ["net.embeddings.patch_embeddings", *(f"net.encoder.stages.{i}.a" for i in range(4))],
        ["net.embeddings", *(f"net.encoder.stages.{i}" for i in range(4))],
    ),
    "transformers CLIP": (
        ["vision.embeddings.patch_embedding", *(f"vision.encoder.layers.{i}" for i in range(3))],
        ["vision.embeddings.patch_embedding", "vision.encoder.layers.2"],
    ),
    "open_clip": (
        ["visual.conv1", *(f"visual.transformer.resblocks.{i}.attn" for i in range(6))],
        ["visual.conv1", "visual.transformer.resblocks.2", "visual.transformer.resblocks.5"],
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_presets(name: str) -> None:
    names, expected = BACKBONES[name]
    assert preset_of(tree(*names)) == expected


def test_no_preset() -> None:
    message = (
        r"layers: no preset for Net. Pass layers=\[...\], names of modules whose outputs .*, for "
        r"example layers=\['conv', .*\]. Its modules: conv, norm, "
    )
    with pytest.raises(ValueError, match=message):
        fastdg.MIRO(Adam(net().parameters()), net())
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    message = r"no preset for Sequential. .* layers=\['0', '2'\]. Its modules: 0, 1, 2, 3, 4\.$"
    with pytest.raises(ValueError, match=message):
        preset_of(model)
    model = nn.Module()
    model.stem, model.body = nn.Linear(2, 2), nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model.head = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^layers: .*layers=\['stem', 'body\.0', 'body\.2'\]"):
        preset_of(model)
    with pytest.raises(ValueError, match=r"^layers: .*oracle"):
        preset_of(nn.Linear(2, 2))
    two = tree(*(f"{side}.{name}" for side in "ab" for name in ("maxpool", *STAGES)))
    with pytest.raises(ValueError, match=r"^layers: .*'a\.layer4', 'b\.layer4'"):
        preset_of(two)


def make(model: nn.Module, *args: Any, **more: Any) -> fastdg.MIRO:
    base = SGD(model.parameters(), lr=0.1)
    return fastdg.MIRO(base, model, *args, **{"layers": ["conv"], **more})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: make(m, layers=["cov"]), ValueError, r"^layers: .*'cov'.*\['conv'"),
        (lambda m: make(m, layers=["conv", "conv"]), ValueError, "^layers: .*'conv' .*twice"),
        (lambda m: make(m, layers="conv"), TypeError, "^layers: .*got 'conv'"),
        (lambda m: make(m, layers=[m.conv]), TypeError, "^layers: .*got Conv2d"),
        (lambda m: make(m, m), ValueError, "^oracle: .*itself"),
        (lambda m: make(m, nn.Linear(2, 2)), ValueError, "^layers: .*oracle.*'conv'"),
        (lambda m: make(m, "resnet"), TypeError, "^oracle: .*got str"),
        (lambda m: make(m, copy.deepcopy(m).to("meta")), ValueError, "^oracle: .*meta"),
        (lambda m: make(m, weight=-1.0), ValueError, "^weight: "),
        (lambda m: make(m, lr_multiplier=0), ValueError, "^lr_multiplier: "),
        (lambda m: make(m, layouts="CNL"), ValueError, "^layouts: .*got 'CNL'"),
        (lambda m: make(m, layouts=(0, 0)), ValueError, r"^layouts: .*got \(0, 0\)"),
        (
            lambda m: make(m, layouts={"conv": (0, 1, 2)}),
            ValueError,
            r"^layouts: .*got \(0, 1, 2\)",
        ),
        (lambda m: make(m, layouts={"norm": "NC"}), ValueError, "^layouts: 'norm'"),
        (lambda m: make(m, layouts=3), TypeError, "^layouts: .*got int"),
        (lambda m: make(m, dtype=torch.int8), ValueError, "^dtype: "),
        (lambda m: fastdg.MIRO(SGD(m.parameters()), "m"), TypeError, "^model: "),
        (lambda m: fastdg.MIRO(m, m), TypeError, "^base: .*got Net"),
        (
            lambda m: fastdg.MIRO(SGD(net().parameters()), m, layers=["conv"]),
            ValueError,
            "^model: ",
        ),
    ],
)
def test_arguments(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(net())


def test_order() -> None:
    """Terms inside, one algorithm around them."""
    model = net()
    with pytest.raises(TypeError, match=r"^base: .*fastdg.Fishr\(fastdg.MIRO\("):
        fastdg.MIRO(fastdg.Fishr(SGD(model.parameters())), model, layers=["conv"])
    with pytest.raises(TypeError, match=r"^base: AgrSum .*Fishr"):
        fastdg.AgrSum(fastdg.Fishr(make(model)))
    assert fastdg.MIRO(make(model), model, layers=["down"]).base.layers == ["conv"]


def step(opt: Any, model: nn.Module, x: Tensor, y: Tensor, **inputs: Any) -> None:
    opt.backward(F.cross_entropy(model(x), y, reduction="none"), y % 2, **inputs)


def test_losses_that_the_model_did_not_make() -> None:
    model, ((x, y, d),) = net(), batches(1)
    opt = make(model)
    losses = F.cross_entropy(copy.deepcopy(model)(x), y, reduction="none")
    with pytest.raises(RuntimeError, match=r"^losses: .*no training forward.*Net"):
        opt.backward(losses, d)
    model.eval()
    with pytest.raises(RuntimeError, match=r"^losses: .*no training forward"):
        step(opt, model, x, y)
    model.train()
    losses = F.cross_entropy(model(x) + model(x), y, reduction="none")
    with pytest.raises(RuntimeError, match=r"^losses: .*several training forwards"):
        opt.backward(losses, d)
    losses = F.cross_entropy(model(x), y, reduction="none")
    with pytest.raises(ValueError, match=r"^losses: .*9 samples.* got 3"):
        opt.backward(losses[:3], d[:3])
    assert model.conv.weight.grad is None
    step(opt, model, x, y)
    opt.step()


def test_inputs_of_backward() -> None:
    model, ((x, y, _),) = net(), batches(1)
    for opt in (make(model), fastdg.Fishr(make(model)), fastdg.Fishr(SGD(model.parameters()))):
        with pytest.raises(TypeError, match=r"^labels: .*\. It takes none"):
            step(opt, model, x, y, labels=y)


class Tricky(nn.Module):
    """Shares a layer, changes a map in place, leaves one out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        if self.kind == "in place":
            h += 1
        if self.kind == "twice":
            h = self.first(h)
        return h if self.kind == "left out" else self.second(h)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("in place", "^layers: .*'first' in place"),
        ("twice", "^layers: 'first' ran twice"),
        ("left out", "^layers: 'second' did not run"),
    ],
)
def test_forwards_that_do_not_go(kind: str, message: str) -> None:
    model = Tricky(kind)
    opt = fastdg.MIRO(SGD(model.parameters()), model, layers=["first", "second"])
    with pytest.raises(RuntimeError, match=message):
        model(torch.randn(3, 4))
    with torch.no_grad():
        model(torch.randn(3, 4))
    del opt
    model(torch.randn(3, 4))  # nobody listens any more


def test_an_oracle_that_does_not_fit() -> None:
    model, oracle = Tricky(""), Tricky("")
    oracle.second = nn.Linear(4, 5)
    opt = fastdg.MIRO(SGD(model.parameters()), model, oracle, layers=["first", "second"])
    with pytest.raises(ValueError, match=r"^oracle: .*'second'.*\(3, 4\).*\(3, 5"):
        model(torch.randn(3, 4))
    assert opt.steps == 0


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.linear(x), None


class Boxed(nn.Module):
    """Its map is its output, in other containers."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.pair(x)[0]}


class Alive:
    """Lies on a graph."""


@pytest.mark.parametrize("used", [False, True])
def test_maps_in_containers_and_a_graph_that_dies(used: bool) -> None:
    """With the losses, although the model's output is a map that the term was made from."""
    model, x, y = Boxed(), torch.randn(5, 4), torch.arange(5) % 3
    opt = fastdg.MIRO(SGD(model.parameters(), lr=0.1), model, layers=["pair"])
    out = model(x)["logits"]
    (below, _), *_ = out.grad_fn.next_functions
    below.metadata["alive"] = alive = Alive()
    reference = weakref.ref(alive)
    losses = F.cross_entropy(out, y, reduction="none")
    if used:
        opt.backward(losses, y % 2)
        opt.step()
    del out, losses, below, alive
    assert reference() is None
