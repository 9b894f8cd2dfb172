"""What `backward` leaves in ``.grad``, however the batch comes and whatever shares the graph."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import batch, emas, network, same, steps, trained, wrap
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import SGD, AdamW, SparseAdam

import fastdg

TWO_WAYS = pytest.mark.parametrize(
    ("params", "weight"), [("head", 0.0), ("head", 5.0), ("all", 0.0), ("all", 5.0)]
)


def near(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None and expected is not None
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def data(samples: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    domains = torch.tensor([0, 2, 2, 0, 1, 1, 2, 0, 0, 2, 0, 2])[:samples]
    return torch.randn(samples, 4).double(), torch.randint(3, (samples,)), domains


def ce(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def sgd(model: nn.Module, **settings: Any) -> fastdg.Fishr:
    return wrap(SGD(model.parameters(), lr=0.1), **{"anneal_steps": 0, **settings})


@pytest.mark.parametrize("cuts", [[5, 4, 3], [1, 11], [4, 2, 6]])
@TWO_WAYS
def test_accumulation_is_the_full_batch(params: str, weight: float, cuts: list[int]) -> None:
    """The first micro-batch has neither all samples nor all domains."""
    model = network(torch.float64)
    twin = copy.deepcopy(model)
    whole = sgd(model, params=params, penalty_weight=weight)
    parts = sgd(twin, params=params, penalty_weight=weight)
    for _ in range(3):
        x, y, d = data()
        whole.zero_grad()
        whole.backward(ce(model, x, y), d)
        parts.zero_grad()
        *first, last = zip(x.split(cuts), y.split(cuts), d.split(cuts), strict=True)
        for micro_x, micro_y, micro_d in first:
            losses = ce(twin, micro_x, micro_y)
            near(parts.backward(losses, micro_d, final=False), losses.detach().mean())
            assert all(p.grad is None for p in twin.parameters())
        near(parts.backward(ce(twin, *last[:2]), last[2]), whole.statistics["loss"])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            near(q.grad, p.grad)
        whole.step()
        parts.step()
        for key, value in whole.statistics.items():
            near(parts.statistics[key].double(), value.double())
        for ema, expected in zip(emas(parts), emas(whole), strict=True):
            near(ema, expected)
    assert parts.steps == 3


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_a_forward_for_each_domain_may_have_batch_statistics_of_its_own(weight: float) -> None:
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(6, 3)).double().train()
    twin = copy.deepcopy(model)
    opt = sgd(model, penalty_weight=weight, ema=None)
    x, y, d = data()
    for domain in range(3):
        mine = d == domain
        opt.backward(ce(model, x[mine], y[mine]), d[mine], final=domain == 2)

    head = list(twin[1].parameters())
    variances, losses = [], []
    for domain in range(3):
        mine = d == domain
        ours = ce(twin, x[mine], y[mine])
        grads = [torch.autograd.grad(one, head, create_graph=True) for one in ours]
        rows = torch.stack([torch.cat([g.flatten() for g in pair]) for pair in grads])
        variances.append(((rows - rows.mean(0)) ** 2).mean(0))
        losses.append(ours)
    v = torch.stack(variances)
    penalty = ((v - v.mean(0)) ** 2).mean(1).mean()
    (torch.cat(losses).mean() + weight * penalty).backward()
    near(opt.statistics["penalty"], penalty.detach())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        near(p.grad, q.grad)
    near(model[0][1].running_var, twin[0][1].running_var)


@TWO_WAYS
def test_gradients_add_to_what_is_there(params: str, weight: float) -> None:
    model = network(torch.float64)
    x, y, d = data()
    opt = sgd(model, params=params, penalty_weight=weight)
    opt.backward(ce(model, x, y), d)
    once = [p.grad.clone() for p in model.parameters()]
    held = [p.grad for p in model.parameters()]
    opt.backward(ce(model, x, y), d)
    for p, first, tensor in zip(model.parameters(), once, held, strict=True):
        assert p.grad is tensor and not p.grad.requires_grad
        near(p.grad, 2 * first)
    opt.step()
    assert opt.steps == 1


def test_clipping_between_backward_and_step() -> None:
    model = network()
    before = copy.deepcopy(model)
    opt = sgd(model)
    opt.backward(*batch(model))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()
    moved = [p - q for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    norm = torch.cat([m.flatten() for m in moved]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-4), rtol=1e-3, atol=0)


@TWO_WAYS
def test_hooks_of_parameters_are_called(params: str, weight: float) -> None:
    model = network(torch.float64)
    x, y, d = data()
    plain = copy.deepcopy(model)
    sgd(plain, params=params, penalty_weight=weight).backward(ce(plain, x, y), d)
    seen: list[Tensor] = []
    model[0].weight.register_hook(lambda grad: grad * 0.5)
    model[2].weight.register_post_accumulate_grad_hook(seen.append)
    sgd(model, params=params, penalty_weight=weight).backward(ce(model, x, y), d)
    near(model[0].weight.grad, plain[0].weight.grad / 2)
    near(model[2].weight.grad, plain[2].weight.grad)
    assert len(seen) == 1


@TWO_WAYS
def test_what_is_not_the_optimizer_s_gets_its_gradient_too(params: str, weight: float) -> None:
    """A part that another optimizer trains, and inputs that ask for a gradient."""
    other, model = nn.Linear(4, 4).double(), network(torch.float64)
    x, y, d = data()
    x.requires_grad_()
    sgd(model, params=params, penalty_weight=weight).backward(ce(model, other(x), y), d)
    got = [x.grad, *(p.grad for p in other.parameters())]
    x.grad = None
    other.zero_grad()
    twin = nn.Sequential(other, model)
    twin.zero_grad()
    named = {"head": list(model[2].parameters()), "all": list(model.parameters())}[params]
    whole = sgd(twin, params=named, penalty_weight=weight)
    whole.backward(ce(twin, x, y), d)
    for grad, expected in zip(got, [x.grad, *(p.grad for p in other.parameters())], strict=True):
        near(grad, expected)


class Sum(nn.Module):
    """Autograd hands the same tensor to both parts of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a + self.b)


@pytest.mark.parametrize("params", [["0.a"], ["1.bias"]])
def test_gradients_that_autograd_shares_do_not_stay_shared(params: list[str]) -> None:
    model = nn.Sequential(Sum(), nn.Linear(3, 3)).double()
    plain = copy.deepcopy(model)
    x, y, d = data()
    wrap(SGD(model.parameters(), lr=0.1), params=params, model=model).backward(ce(model, x, y), d)
    ce(plain, x, y).mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        near(p.grad, q.grad)
    model[0].a.grad.zero_()
    near(model[0].b.grad, plain[0].b.grad)


def test_gradients_are_laid_out_like_their_parameters() -> None:
    """Fused optimizers read both in memory order."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    model = model.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    opt = wrap(AdamW(model.parameters(), lr=1e-2, fused=True), params="all")
    reference = AdamW(plain.parameters(), lr=1e-2, fused=True)
    x, y = torch.randn(8, 3, 6, 6), torch.randint(3, (8,))
    opt.backward(ce(model, x, y), torch.arange(8) % 2)
    assert model[0].weight.grad.stride() == model[0].weight.stride()
    opt.step()
    ce(plain, x, y).mean().backward()
    reference.step()
    torch.testing.assert_close(model[0].weight, plain[0].weight)


def test_sparse_gradients_beside_the_tracked_part() -> None:
    table = nn.Embedding(7, 4, sparse=True)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 3)).double()
    plain = copy.deepcopy(model)
    x, y = torch.randint(7, (12, 2)), torch.randint(3, (12,))
    opt = sgd(model, params=list(model[2].parameters()), penalty_weight=0.0)
    for _ in range(2):
        opt.backward(ce(model, x, y), data()[2])
        ce(plain, x, y).mean().backward()
    assert table.weight.grad.is_sparse
    near(table.weight.grad.to_dense(), plain[0].weight.grad.to_dense())
    opt.step()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.go_left = True

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left if self.go_left else self.right)(x).tanh())


@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_layers_that_run_later_are_found(weight: float) -> None:
    model = Branches()
    opt = sgd(model, params="all", penalty_weight=weight)
    steps(model, opt, range(2))
    assert model.right.weight.grad is None
    history = opt.state[model.left.weight]["fishr_ema"].clone()
    model.go_left = False
    steps(model, opt, range(2))
    assert model.left.weight.grad is None
    assert opt.state[model.right.weight]["fishr_ema"].gt(0).any()
    assert torch.equal(opt.state_dict()["state"][0]["fishr_ema"], history)


def test_nothing_is_left_on_the_model() -> None:
    gc.collect()
    tables = [
        v for k, v in vars(torch_module).items() if k.startswith("_global") and isinstance(v, dict)
    ]
    assert len(tables) >= 5
    hooks = [len(table) for table in tables]
    model = network()
    for _ in range(3):
        steps(model, sgd(model), range(1))
        wrap(SGD(model.parameters()), model=model)
        sgd(model)
    gc.collect()
    assert [len(table) for table in tables] == hooks
    assert not any(module._forward_hooks for module in model.modules())


def test_evaluation_between_forward_and_backward_is_not_the_forward() -> None:
    model, opt = trained(lambda p: SGD(p, lr=0.1))
    twin, reference = copy.deepcopy((model, opt))
    losses, domains = batch(model, 5)
    with torch.no_grad():
        batch(model, 6)
    batch(model, 7)  # nor is one whose losses are never used
    opt.zero_grad()
    opt.backward(losses, domains)
    opt.step()
    steps(twin, reference, [5])
    same(model, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@TWO_WAYS
def test_low_precision_losses_are_averaged_in_float32(
    params: str, weight: float, dtype: torch.dtype
) -> None:
    """Sums over many samples neither stop growing nor overflow."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    opt = sgd(model, params=params, penalty_weight=weight)
    x = torch.ones(8192, 1, dtype=dtype)
    d = torch.arange(8192) % 2
    with torch.no_grad():
        model.weight.fill_(10.0)
    losses = model(x).squeeze(1) + d.to(dtype)
    assert float(opt.backward(losses, d)) == 10.5
    assert opt.statistics["domain_loss"].tolist() == [10.0, 11.0]
    assert opt.statistics["domain_count"].tolist() == [4096, 4096]
    assert model.weight.grad.dtype == dtype and float(model.weight.grad) == 1.0
    partial = opt.backward(model(x).squeeze(1), d, final=False)
    assert partial.dtype == torch.float32 and float(partial) == 10.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_parameters_have_float32_statistics(dtype: torch.dtype) -> None:
    model, opt = trained(lambda p: SGD(p, lr=0.1), dtype, params="all")
    for p in model.parameters():
        assert p.grad.dtype == dtype
        assert opt.state[p]["fishr_ema"].dtype == torch.float32


@pytest.mark.parametrize("params", ["all", "words"])
def test_sparse_gradients_stay_sparse(params: str) -> None:
    """Whether or not the penalty is on: sparse optimizers take nothing else."""
    model = nn.Sequential(nn.Embedding(20, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3))
    words = torch.randint(20, (9, 2))
    opt = fastdg.Fishr(
        SparseAdam(model[0].parameters(), lr=0.1),
        params="all" if params == "all" else [model[0].weight],
        anneal_steps=2,
    )
    _, y, d = data(9)
    for _ in range(4):
        opt.zero_grad()
        opt.backward(ce(model, words, y), d)
        assert model[0].weight.grad.is_sparse
        opt.step()
    assert opt.steps == 4


def test_a_domain_without_samples_makes_no_nan_on_the_way() -> None:
    """Autograd's search for anomalies looks at the gradients of all operations."""
    model = nn.Linear(3, 2)
    opt = fastdg.VREx(SGD(model.parameters(), lr=0.1), anneal_steps=0, num_domains=4)
    losses = F.cross_entropy(model(torch.randn(6, 3)), torch.arange(6) % 2, reduction="none")
    torch.autograd.set_detect_anomaly(True)
    try:
        opt.backward(losses, torch.arange(6) % 2)
    finally:
        torch.autograd.set_detect_anomaly(False)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
