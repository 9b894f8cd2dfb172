"""The walk of the autograd graph: its nodes, its readers, and when two graphs are alike."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastdg.gradients.graph import Graph, holds_samples, output_dtypes, output_shapes, signed


def graph_of(tensor: Tensor) -> Graph:
    assert tensor.grad_fn is not None
    return Graph(tensor.grad_fn)


def signature(tensor: Tensor, *parameters: Tensor) -> Hashable:
    return graph_of(tensor).signature(parameters)


def test_nodes_readers_and_leaves() -> None:
    w, x = nn.Parameter(torch.rand(3)), torch.rand(4, 3)
    h = x * w
    losses = (h.exp() + h).sum(1)
    graph = graph_of(losses)
    names = [node.name() for node in graph.nodes]
    assert names[0] == "SumBackward1"
    once = {"AddBackward0", "ExpBackward0", "MulBackward0", "torch::autograd::AccumulateGrad"}
    assert sorted(names) == sorted({"SumBackward1"} | once)
    assert [graph.nodes[k] for k in graph.position.values()] == graph.nodes
    mul = next(node for node in graph.nodes if node.name() == "MulBackward0")
    readers = {(node.name(), slot) for node, slot, _ in graph.consumers[mul]}
    assert readers == {("ExpBackward0", 0), ("AddBackward0", 1)}
    assert set(graph.leaves) == {id(w)}
    assert graph.leaves[id(w)].variable is w  # type: ignore[attr-defined]
    assert output_shapes(mul) == ((4, 3),)
    assert output_dtypes(mul) == (torch.float64,)
    above = {node.name() for node in graph.above([mul])}
    assert above == {"ExpBackward0", "AddBackward0", "SumBackward1"}
    assert not graph.above([graph.nodes[0]])


def test_a_reader_that_reads_twice() -> None:
    w = nn.Parameter(torch.rand(2, 2))
    graph = graph_of((w * w).sum(1))
    leaf = graph.leaves[id(w)]
    assert [slot for _, slot, _ in graph.consumers[leaf]] == [0, 1]


def test_outputs_without_a_gradient_have_no_shape() -> None:
    table = nn.Parameter(torch.rand(4, 3))
    values, index = table.max(1)
    assert not index.requires_grad
    assert output_shapes(values.grad_fn)[0] == (4,)  # type: ignore[arg-type]


def test_signed() -> None:
    assert [signed(n) for n in (0, 5, 2**64 - 1, 2**64 - 3)] == [0, 5, -1, -3]


ALIKE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "values": lambda x, k: x * (k + 1),
    "chunks": lambda x, k: torch.cat([part.exp() for part in x.split([2, 4])]),
}
DIFFERENT: dict[str, Callable[[Tensor, int], Tensor]] = {
    "operation": lambda x, k: x.exp() if k else x.sin(),
    "order": lambda x, k: x.exp().sin() if k else x.sin().exp(),
    "sizes of a split": lambda x, k: torch.cat([p.exp() for p in x.split([2 + k, 4 - k])]),
    "start of a slice": lambda x, k: x[k : k + 3],
    "selected": lambda x, k: x[k],
    "axis": lambda x, k: x.sum(k),
    "axis, same size": lambda x, k: x[:3].softmax(k),
    "transposed": lambda x, k: x[:3].transpose(0, k),
    "flipped": lambda x, k: x.flip(k),
    "rolled": lambda x, k: x.roll(1 + k, 0),
    "shape": lambda x, k: x.view(6, 3) if k else x.view(3, 6),
    "once or twice": lambda x, k: x.exp() + (x.exp() if k else x.sin()),
}


@pytest.mark.parametrize("run", ALIKE.values(), ids=ALIKE.keys())
def test_graphs_that_are_alike(run: Callable[[Tensor, int], Tensor]) -> None:
    w = nn.Parameter(torch.rand(6, 3))
    assert signature(run(w, 0), w) == signature(run(w, 1), w)
    assert hash(signature(run(w, 0), w)) == hash(signature(run(w, 1), w))


@pytest.mark.parametrize("run", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_graphs_that_are_not_alike(run: Callable[[Tensor, int], Tensor]) -> None:
    w = nn.Parameter(torch.rand(6, 3))
    assert signature(run(w, 0), w) != signature(run(w, 1), w)


def test_the_parameters_asked_for_belong_to_the_signature() -> None:
    one, two = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
    y = (one * 2 + two).sum()
    assert len({signature(y, one), signature(y, two), signature(y, one, two), signature(y)}) == 4
    assert signature((one * 2 + one).sum(), one) != signature((one * 2 + two).sum(), one)


def test_training_mode_belongs_to_the_signature() -> None:
    norm, x = nn.BatchNorm1d(3), torch.rand(4, 3)
    training = signature(norm(x), norm.weight)
    assert training != signature(norm.eval()(x), norm.weight)


def test_a_signature_keeps_nothing_alive() -> None:
    w = nn.Parameter(torch.rand(3))
    y = (w * 2).exp()
    kept, node = signature(y, w), weakref.ref(y)
    del y
    gc.collect()
    assert node() is None
    assert kept == signature((w * 2).exp(), w)


MADE_OF_PARAMETERS = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 5)).weight,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(5, 5)).weight,
    "product": lambda: nn.Parameter(torch.rand(5, 2)) @ nn.Parameter(torch.rand(2, 5)),
    "positions": lambda: nn.Linear(2, 6)(torch.rand(9, 2)),
    "prod": lambda: nn.Parameter(torch.rand(5, 3)).prod(0),
}
MADE_OF_SAMPLES = {
    "linear": lambda x: nn.Linear(4, 3)(x),
    "convolution": lambda x: nn.Conv1d(4, 3, 1)(x.unsqueeze(2)),
    "sequence first": lambda x: nn.Linear(4, 3)(x.expand(7, 5, 4)),
    "norm above": lambda x: nn.BatchNorm1d(3)(nn.Linear(4, 3)(x)).exp(),
    "lookup": lambda x: nn.Embedding(9, 4)(torch.arange(5)) * 2,
}


@pytest.mark.parametrize("make", MADE_OF_PARAMETERS.values(), ids=MADE_OF_PARAMETERS.keys())
def test_tensors_that_samples_share(make: Callable[[], Tensor]) -> None:
    node = make().grad_fn
    assert node is not None
    assert not holds_samples(node, 5)


@pytest.mark.parametrize("make", MADE_OF_SAMPLES.values(), ids=MADE_OF_SAMPLES.keys())
def test_tensors_made_of_samples(make: Callable[[Tensor], Tensor]) -> None:
    node = F.relu(make(torch.rand(5, 4))).grad_fn
    assert node is not None
    assert holds_samples(node, 5)
