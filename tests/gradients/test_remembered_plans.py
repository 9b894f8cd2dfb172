"""A plan remembered for graphs of one signature is right for each of them.

Every model here has the same operations and shapes in all steps, while values, or sizes that an
operation saves, move rows to other samples, or mix samples that a zero kept apart before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdg
from fastdg.gradients import engine
from fastdg.gradients.graph import _LAYOUT, Graph, output_shapes
from fastdg.gradients.ownership import carry

N = 4  # samples, and features: so that no shape tells one dimension from the other
FAR = 1e3

# h [N, N] of a linear layer, its input x, whether this step does the other thing -> losses [N]
Loss = Callable[[Tensor, Tensor, bool], Tensor]
CASES: dict[str, Loss] = {}


def case(name: str) -> Callable[[Loss], Loss]:
    def register(loss: Loss) -> Loss:
        CASES[name] = loss
        return loss

    return register


def squares(h: Tensor) -> Tensor:
    return h.square().sum(1)


def beside(h: Tensor, term: Tensor) -> Tensor:
    return squares(h) + term.tanh().sum(1)


def ones_or_eye(on: bool) -> Tensor:
    return torch.rand(N, N) if on else torch.eye(N)


CASES |= {
    # Rows chosen by values
    "embedding": lambda h, x, on: squares(F.embedding(torch.randperm(N), h)),
    "index_select": lambda h, x, on: squares(h.index_select(0, torch.randperm(N))),
    "index": lambda h, x, on: squares(h[torch.randperm(N)]),
    "gather": lambda h, x, on: squares(h.gather(0, torch.randint(0, N, (N, N)))),
    "sort": lambda h, x, on: squares(h.sort(0)[0]),
    "topk": lambda h, x, on: squares(h.topk(N, 0)[0]),
    "maximum along samples": lambda h, x, on: h.max(0)[0].square(),
    "max_pool along samples": lambda h, x, on: squares(
        F.max_pool1d(h.t()[None], 2, stride=1, padding=1)[0].t()[:N]
    ),
    "index_add": lambda h, x, on: squares(torch.zeros(N, N).index_add(0, torch.randperm(N), h)),
    "product with a permutation": lambda h, x, on: squares(torch.eye(N)[torch.randperm(N)] @ h),
    "product and sum": lambda h, x, on: squares(
        (torch.eye(N)[torch.randperm(N)].unsqueeze(-1) * h.unsqueeze(0)).sum(1)
    ),
    "classes are samples": lambda h, x, on: F.nll_loss(
        h.t().tanh(), torch.randint(0, N, (N,)), reduction="none"
    ),
    # Rows moved by sizes that an operation saves
    "pad": lambda h, x, on: squares(1 + F.pad(h[1:], (0, 0, 1, 0) if on else (0, 0, 0, 1))),
    "diagonal": lambda h, x, on: F.pad(
        (h.unsqueeze(1) + x).diagonal(1 if on else -1).square().sum(0), (0, 1)
    ),
    "amax": lambda h, x, on: h.amax(0 if on else 1),
    "logsumexp": lambda h, x, on: h.logsumexp(0 if on else 1),
    "cumsum": lambda h, x, on: h.cumsum(0 if on else 1)[:, -1],
    "vector_norm": lambda h, x, on: torch.linalg.vector_norm(h, dim=0 if on else 1),
    "prod": lambda h, x, on: h.prod(0 if on else 1),
    "std": lambda h, x, on: h.std(0 if on else 1),
    "max": lambda h, x, on: h.max(0 if on else 1)[0],
    "sum": lambda h, x, on: h.square().sum(0 if on else 1),
    "softmax": lambda h, x, on: squares(h.softmax(0 if on else 1)),
    "layer_norm": lambda h, x, on: (F.layer_norm(h, (N, N) if on else (N,)) * x).sum(1),
    "addmm's factor": lambda h, x, on: squares(torch.addmm(h, x, h, alpha=2 if on else 1)),
    # Samples mixed where a zero hid it
    "gate of a mean": lambda h, x, on: squares(h) + float(on) * h.mean(0).square().sum(),
    "gate of pairs": lambda h, x, on: beside(h, float(on) * h.flip(0)),
    "a tiny gate": lambda h, x, on: beside(h, (1.0 if on else 1e-30) * h.flip(0)),
    "a weight of each pair": lambda h, x, on: (
        squares(h) + (torch.eye(N)[0] * float(on)) * h.roll(1, 0).tanh().sum(1)
    ),
    "dropout": lambda h, x, on: beside(h, F.dropout(h.flip(0), 0.0 if on else 1.0)),
    "where": lambda h, x, on: squares(
        torch.where(torch.arange(N).remainder(2).bool()[:, None] & on, h.flip(0), h)
    ),
    "masked_fill": lambda h, x, on: beside(
        h, h.flip(0).masked_fill(torch.full((N, 1), not on), 0.0)
    ),
    "maximum": lambda h, x, on: torch.maximum(h, h.flip(0) - (0 if on else FAR)).sum(1),
    "clamp": lambda h, x, on: beside(h, (h.flip(0) + (0 if on else FAR)).clamp(-50, 50)),
    "threshold": lambda h, x, on: beside(h, F.threshold(h.flip(0), -FAR if on else FAR, 0.0)),
    "dead units": lambda h, x, on: F.relu(h).sum(1) + F.relu(h.flip(0) - (0 if on else FAR)).sum(1),
    "saturated attention": lambda h, x, on: (
        (h @ x.t() + (0 if on else 1e6) * torch.eye(N)).softmax(1) @ x
    ).sum(1),
    "a constant matrix": lambda h, x, on: squares(ones_or_eye(on) @ h),
    "a batched matrix": lambda h, x, on: (
        ones_or_eye(on).expand(2, N, N).bmm(h.expand(2, N, N)).square().sum((0, 2))
    ),
    "batch norm behind a gate": lambda h, x, on: beside(
        h, float(on) * F.batch_norm(h, None, None, training=True)
    ),
    "convolution along samples": lambda h, x, on: (
        F.conv1d(h.t()[:, None], torch.tensor([[[float(on), 1.0, 0.0]]]), padding=1)[:, 0]
        .square()
        .sum(0)
    ),
    "windows along samples": lambda h, x, on: squares(
        (torch.cat([h, h[:1]]).unfold(0, 2, 1) * torch.tensor([1.0, float(on)])).sum(2)
    ),
}


@case("writes into slices")
def _(h: Tensor, x: Tensor, on: bool) -> Tensor:
    out, first = torch.zeros(N, N), 2 * on
    out[first : first + 2] = h[:2]
    out[2 - first : 4 - first] = h[2:]
    return squares(out)


@case("writes into rows")
def _(h: Tensor, x: Tensor, on: bool) -> Tensor:
    out = torch.zeros(N, N)
    for i, k in enumerate([1, 0, 3, 2] if on else range(N)):
        out[k] = h[i]
    return squares(out)


def domain_means(losses: Tensor, parameters: list[Tensor], domains: Tensor) -> list[Tensor]:
    """By one backward of autograd for each sample."""
    rows = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    grads = [torch.stack(of_one) for of_one in zip(*rows, strict=True)]
    return [torch.stack([g[domains == d].mean(0) for d in (0, 1)]) for g in grads]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    engine._plans.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(before)


def compare(model: nn.Module, losses: Tensor) -> None:
    domains = torch.arange(len(losses)) % 2
    expected = domain_means(losses, list(model.parameters()), domains)
    got = fastdg.domain_gradients(losses, domains, params=model)
    for (name, p), g in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(
            got.get(name, torch.zeros(2, *p.shape)), g, rtol=1e-9, atol=1e-11, msg=name
        )


# None of these steps is probed just because it is the 1st, 2nd, 4th or 8th; the other thing is
# done first, or later
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_operations_other_samples(name: str, first: bool) -> None:
    model = nn.Linear(N, N)
    for on in (first, first, not first, first, not first, not first, first):
        x = torch.randn(N, N)
        compare(model, CASES[name](model(x), x, on))


def test_rows_that_had_no_gradient_were_completed_by_a_pattern() -> None:
    """The second half of the rows is in reverse, which shows only when its term is on."""
    model = nn.Linear(N, N)
    for on in (False, False, True, False, True):
        a, b = model(torch.randn(2 * N, N)).split(N)
        compare(model, squares(a) + float(on) * squares(b.flip(0)))


def test_a_lower_boundary_below_an_upper_one() -> None:
    """The slice belongs to one sample; the windows, which read it beside the whole, to several."""
    model = nn.Linear(N, N)
    h = model(torch.randn(N, N))
    windows = torch.cat([h, h[:1]]).unfold(0, 2, 1)
    compare(model, squares(windows.sum(2)))


def test_a_branch_of_zeros_is_remembered_where_the_operations_tell_its_rows() -> None:
    class ReZero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gate = nn.Linear(N, N), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * self.body(x).tanh()

    model = nn.Sequential(nn.Linear(N, N), ReZero(), nn.Linear(N, N))
    for gate in (0.0, 0.0, 0.3, 0.0, 0.5):
        model[1].gate.data.fill_(gate)
        losses = squares(model(torch.randn(N, N)))
        assert not engine.plan_gradients(losses, dict(model.named_parameters())).plan.dynamic
        compare(model, losses)
    assert len(engine._plans) == 1


def math_attention(*given: Tensor) -> Tensor:
    """Attention that has a second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*given)


# Operations that keep rows apart, beside the cases above
KEEP: dict[str, Callable[[Tensor], Tensor]] = {
    "views": lambda h: h.view(N, 2, 2).transpose(1, 2).flatten(1).unsqueeze(0).squeeze(0).t().t(),
    "permute": lambda h: h.view(N, 2, 2).permute(2, 0, 1).permute(1, 0, 2).reshape(N, N),
    "split": lambda h: torch.cat([part.flip(0).flip(0) for part in h.split([1, 3])]),
    "chunk and stack": lambda h: torch.stack(h.unbind(0)[::-1]).flip(0),
    "select": lambda h: torch.stack([h[k] for k in range(N)]),
    "slices": lambda h: torch.cat([h[2:], h[:2]]).roll(2, 0),
    "negative": lambda h: torch.cat([h[-1:], h[:-1]])[..., -3:].roll(-1, 0),
    "pad": lambda h: F.pad(h, (0, 0, 2, 0))[2:],
    "crop": lambda h: F.pad(F.pad(h, (0, 0, 1, 1)), (0, 0, -1, -1)),
    "expand": lambda h: h.unsqueeze(1).expand(N, 3, N).sum(1),
    "norms": lambda h: F.rms_norm(F.layer_norm(h, (N,)), (N,)).softmax(1).cumsum(1),
    "reductions": lambda h: (
        h - h.mean(1, keepdim=True) + h.var(1, keepdim=True) * h.amax(1)[:, None]
    ),
    "glu": lambda h: F.glu(h, 1),
    "convolution": lambda h: F.max_pool1d(F.conv1d(h[:, None], torch.ones(2, 1, 2)), 2).flatten(1),
    "products": lambda h: torch.addmm(h, h, torch.ones(N, N)) + (h @ torch.ones(N))[:, None],
    "batched": lambda h: torch.baddbmm(h[:, None], h[:, None], torch.ones(N, N, N)).flatten(1),
    "columns": lambda h: (torch.ones(3, N) @ h.t()).t(),
    "attention": lambda h: F.scaled_dot_product_attention(*(h.view(N, 1, 2, 2),) * 3).flatten(1),
    "attention of products": lambda h: math_attention(*(h.view(N, 1, 2, 2),) * 3).flatten(1),
    "diagonal": lambda h: h.diag_embed().diagonal(0, 1, 2),
    "sample last": lambda h: h.t().contiguous().tanh().cumsum(0).t(),
}


@pytest.mark.parametrize("name", KEEP)
def test_operations_that_keep_rows_apart_are_remembered(name: str) -> None:
    model = nn.Linear(N, N)
    losses = squares(KEEP[name](model(torch.randn(N, N))))
    if name != "diagonal":  # diag_embed writes into a slice
        assert not engine.plan_gradients(losses, dict(model.named_parameters())).plan.dynamic
    for _ in range(3):
        compare(model, squares(KEEP[name](model(torch.randn(N, N)))))


class _Reads:
    """A graph node that notes which saved values are read."""

    def __init__(self, node: object) -> None:
        self._node, self.read = node, set[str]()

    def __getattr__(self, name: str) -> object:
        if name.startswith("_saved_"):
            self.read.add(name)
        return getattr(self._node, name)


@pytest.mark.parametrize("name", [*KEEP, *CASES])
def test_the_signature_holds_what_is_read_of_a_node(name: str) -> None:
    h, x = torch.randn(N, N, requires_grad=True), torch.randn(N, N)
    losses = squares(KEEP[name](h)) if name in KEEP else CASES[name](h, x, True)
    assert losses.grad_fn is not None
    for node in Graph(losses.grad_fn).nodes:
        shapes = output_shapes(node) if node.next_functions else ()
        rule, out = carry.CARRY.get(node.name()), shapes[0] if shapes else None
        if rule is None or out is None:
            continue
        for slot, (child, nr) in enumerate(node.next_functions):
            shape = None if child is None else carry._shape_of(child, nr)
            if shape is None:
                continue
            noted = _Reads(node)
            try:
                rule(noted, 0, torch.zeros([1] * len(out), dtype=torch.int64), out, slot, shape)
            except carry.Unknown:
                continue
            assert noted.read <= set(_LAYOUT.get(node.name(), ())), node.name()
