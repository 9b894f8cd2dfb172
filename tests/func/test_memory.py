"""One chunk at a time, measured; and the same under a compiler."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastdg import func


class Peak(TorchDispatchMode):
    """The most elements that tensors made inside hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.most = 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in pytree.tree_leaves(args) if is_tensor(x)}
        out = op(*args, **(kwargs or {}))
        for x in filter(is_tensor, pytree.tree_leaves(out)):
            storage = x.untyped_storage()
            if storage._cdata in self.seen | inputs:
                continue
            size = storage.nbytes() // x.element_size()
            self.seen.add(storage._cdata)
            self.alive += size
            weakref.finalize(storage, self.end, storage._cdata, size)
        self.most = max(self.most, self.alive)
        return out

    def end(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size


def is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


I, O = 40, 50  # noqa: E741


def wide(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ params["w"]).square().sum()


def peak(samples: int, chunk_size: int, statistic: str, backward: bool) -> float:
    """In parameters."""
    w, x = torch.randn(I, O, requires_grad=backward), torch.randn(samples, I)
    given = {"domains": torch.zeros(samples).long()} if "domain" in statistic else {}
    with Peak() as mode:
        out = getattr(func, statistic)(wide, {"w": w}, x, chunk_size=chunk_size, **given)
        out = out.variance["w"] if statistic == "domain_moments" else out
        if backward:
            out.square().sum().backward()
    return mode.most / w.numel()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("statistic", ["domain_moments", "per_sample_norms", "domain_gram"])
def test_one_chunk_is_alive_at_a_time(statistic: str, backward: bool) -> None:
    few, many = peak(32, 8, statistic, backward), peak(64, 8, statistic, backward)
    assert many - few < 0.5  # the batch and its activations, but no gradients
    # A sample more in a chunk is one gradient more in a forward; three more in a backward.
    slope = (peak(64, 16, statistic, backward) - many) / 8
    assert slope < (3.2 if backward else 1.2)


# -- compiled --

NET = nn.Sequential(nn.Linear(I, O), nn.Tanh(), nn.Linear(O, 3))


def of_net(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.func.functional_call(NET, params, (x,)), y)


def statistics(params: dict[str, Tensor], x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    given: dict[str, Any] = {"domains": ids, "num_domains": 2, "chunk_size": 5}
    variance = func.domain_moments(of_net, params, x, y, **given).variance
    return sum((v.sum() + v.square().sum() for v in variance.values()), x.new_zeros(()))


def other_statistics(params: dict[str, Tensor], x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    gram = func.domain_gram(of_net, params, x, y, domains=ids, num_domains=2)
    norms = func.per_sample_norms(of_net, params, x, y, chunk_size=5)
    return gram.square().sum() + norms.pow(3).sum()


def data() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    params = dict(NET.named_parameters())
    x = torch.randn(9, I, requires_grad=True)
    return params, x, torch.arange(9) % 3, torch.arange(9) % 2


def assert_same(compiled: Callable[..., Tensor], plain: Callable[..., Tensor]) -> None:
    args = data()
    got, expected = compiled(*args), plain(*args)
    torch.testing.assert_close(got, expected)
    leaves = [*args[0].values(), args[1]]
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch in itself
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_compiled_moments_keep_no_chunk_for_the_backward() -> None:
    """With the partitioner of inductor, which looks for what it need not compute again."""
    saved: list[int] = []

    def forward(graph: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        (outputs,) = graph.graph.find_nodes(op="output")[0].args
        values = [x.meta["val"] for x in outputs if isinstance(x, torch.fx.Node)]
        saved.append(sum(x.numel() for x in values if isinstance(x, Tensor)))
        return graph

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: graph,
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    assert_same(torch.compile(statistics, fullgraph=True, backend=backend), statistics)
    parameters = sum(p.numel() for p in NET.parameters())
    # Parameters, batch, means and variances of two domains; no gradients of nine samples.
    assert saved and max(saved) < 6 * parameters


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch in itself
def test_other_statistics_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(other_statistics, fullgraph=True, backend="aot_eager")
    assert_same(compiled, other_statistics)


def test_values_alone_compile() -> None:
    def samples(w: Tensor, x: Tensor) -> Tensor:
        return func.per_sample_gradients(wide, {"w": w}, x, chunk_size=2)["w"]

    torch._dynamo.reset()
    w, x = torch.randn(4, 3, requires_grad=True), torch.randn(3, 4)
    with torch.no_grad():
        compiled = torch.compile(samples, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(w, x), samples(w, x))


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch in itself
def test_compiles_with_inductor() -> None:
    def spread(w: Tensor, x: Tensor) -> Tensor:
        ids = torch.zeros(3, dtype=torch.int64)
        found = func.domain_moments(wide, {"w": w}, x, domains=ids, num_domains=1)
        return found.variance["w"].sum()

    torch._dynamo.reset()
    w, x = torch.randn(4, 3, requires_grad=True), torch.randn(3, 4)
    got, expected = torch.compile(spread, fullgraph=True)(w, x), spread(w, x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, w), torch.autograd.grad(expected, w))


def test_random_numbers_are_refused_when_compiled() -> None:
    def noisy(w: Tensor, x: Tensor) -> Tensor:
        return func.per_sample_norms(wide, {"w": w}, x, randomness="different")

    torch._dynamo.reset()
    compiled = torch.compile(noisy, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"expected 'error' under torch\.compile"):
        compiled(torch.randn(4, 3), torch.randn(3, 4))
