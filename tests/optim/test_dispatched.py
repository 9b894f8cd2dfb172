"""What a step asks of torch beside plain training: nothing that a GPU adds up in any order, and no
copies of activations in another dtype."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import RULES, WRAPS, Network, batch
from on_device import DEVICE
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import fastdg
from fastdg.ops.dispatch.registry import OPS

# Of float numbers, as torch.use_deterministic_algorithms lists them for CUDA
ANY_ORDER = (
    *("index_add", "scatter_add", "scatter_reduce", "cumsum", "bincount", "histc"),
    *("embedding_dense_backward", "_embedding_bag_dense_backward"),
)
ACCUMULATE = ("index_put", "_index_put_impl", "put", "_unsafe_index_put")


def in_any_order(name: str, args: tuple[Any, ...]) -> bool:
    floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in args)
    return floats and (name in ANY_ORDER or (name in ACCUMULATE and True in args[3:]))


class Watch(TorchDispatchMode):
    """Counts calls that a GPU adds up in any order, and conversions of maps to another dtype."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, self.unordered = samples, Counter[str]()
        self.conversions, self.converted = 0, 0  # calls, bytes read and written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].rstrip("_")
        if in_any_order(name, args):
            self.unordered[name] += 1
        if name == "_to_copy" and args[0].dim() > 1 and len(args[0]) == self.samples:
            floats = result.is_floating_point() and result.dtype != args[0].dtype
            self.conversions += floats
            self.converted += floats * (args[0].nbytes + result.nbytes)
        return result


class Rich(nn.Module):
    """A layer of each kind: a table, convolutions, norms, a shared offset, a normed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.convolution = nn.Conv1d(8, 8, 3, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.offset = nn.Parameter(torch.randn(4, 8))
        self.rows = nn.LayerNorm(8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.convolution(self.table(tokens).mT)).mT + self.offset
        return self.head(self.normed(self.rows(h)).tanh().mean(1))


def rich_batch(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(9, (12, 6), generator=generator)
    losses = F.cross_entropy(model(tokens), torch.arange(12) % 3, reduction="none")
    return losses, torch.randint(3, (12,), generator=generator)


def watched(
    model: nn.Module, opt: Any, data: Callable[[nn.Module, int], tuple[Tensor, Tensor]], plain: bool
) -> Watch:
    """The third step, which looks for no rows any more."""
    for seed in (1, 2, 3):
        opt.zero_grad()
        with Watch(12) as watch:
            losses, domains = data(model, seed)
            losses.mean().backward() if plain else opt.backward(losses, domains)
            opt.step()
    return watch


@pytest.mark.parametrize("rich", [False, True], ids=["small", "every layer"])
@pytest.mark.parametrize("name", [*WRAPS, *RULES])
def test_nothing_is_added_up_in_any_order(name: str, rich: bool) -> None:
    if rich and ("MIRO" in name or "SWAD" in name or "SMA" in name or name == "RISE"):
        pytest.skip("looks for its own network")
    data = (lambda model, seed: rich_batch(model, seed)) if rich else batch
    found = []
    for plain in (True, False):
        torch.manual_seed(0)
        model = Rich() if rich else Network()
        base = SGD(model.parameters(), lr=0.01)
        all_layers = {"params": "all"} if name == "Fishr" else {}
        opt = base if plain else (WRAPS | RULES)[name](base, **all_layers)
        found.append(watched(model, opt, data, plain).unordered)
    assert not found[1] - found[0]


@pytest.mark.parametrize("name", ["CORAL", "CausIRL", "MMD", "IBERM", "IBIRM", "SD", "EQRM", "RDM"])
def test_nor_by_objectives_of_features(name: str) -> None:
    model, domains = Network(), torch.arange(12) % 3
    opt = getattr(fastdg, name)(SGD(model.parameters(), lr=0.01))
    for _ in range(3):
        opt.zero_grad()
        with Watch(12) as watch:
            features = model[1](model[0](torch.randn(12, 4)))
            logits = model[2](features)
            losses = F.cross_entropy(logits, domains, reduction="none")
            given = {"SD": {"logits": logits}, "EQRM": {}, "RDM": {}}
            opt.backward(losses, domains, **given.get(name, {"features": features}))
            opt.step()
    assert not watch.unordered


def test_nor_by_the_references_of_ops_without_a_kernel() -> None:
    """Where a GPU has no kernel, it runs the reference."""
    kernels = pytest.importorskip("fastdg.kernels")
    source = (Path(__file__).parents[2] / "csrc" / "column_ops.h").read_text()
    compiled = set(re.findall(r'm\.impl\("(\w+)"', source))
    triton = {name for name, _, _ in kernels.implementations(OPS)}
    assert OPS.keys() - compiled - triton == {"outer_gram", "loss_sums"}
    for shape in ((5, 1, 40, 30), (5, 3, 4, 6)):
        N, T, inputs, outputs = shape
        a, delta = torch.randn(N, T, inputs), torch.randn(N, T, outputs)
        with Watch(N) as watch:
            OPS["outer_gram"].reference(a, delta, torch.arange(5), torch.tensor([0, 3, 5]), [])
            OPS["loss_sums"].reference(a[:, 0, 0], torch.arange(N) % 2, 2)
        assert not watch.unordered


@pytest.mark.parametrize(
    ("wrap", "beyond"),
    [
        (fastdg.AgrSum, 0),
        (lambda base: fastdg.Fishr(base, params="all", anneal_steps=10), 0),
        # Autograd's own derivative of a batch norm in bfloat16 computes in float32: one each
        (lambda base: fastdg.Fishr(base, params="all", anneal_steps=0), 56),
    ],
    ids=["AgrSum", "statistic", "penalty"],
)
def test_maps_stay_in_bfloat16(wrap: Callable[..., Any], beyond: int) -> None:
    models = pytest.importorskip("torchvision.models")
    counts = []
    for plain in (True, False):
        torch.manual_seed(0)
        model = models.resnet50().eval()

        def data(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = model(torch.randn(12, 3, 32, 32))
                losses = F.cross_entropy(logits, torch.arange(12), reduction="none")
            return losses, torch.arange(12) % 2

        base = SGD(model.parameters(), lr=1e-5)
        counts.append(watched(model, base if plain else wrap(base), data, plain))
    print(*((w.conversions, w.converted) for w in counts))
    assert counts[1].conversions <= counts[0].conversions + beyond
