"""Fishr against its definition: per-sample loops in float64, a few lines, no part of fastdg."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import fastdg
from fastdg.core.step_batch import StepBatch
from fastdg.gradients import engine

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, labels, domains
SCRIPT = {"reduction": "sum", "ema": None, "pre_anneal_weight": 1.0, "reset_base": False}


class Tokens(nn.Module):
    """Words to classes; a learned scalar temperature is a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 5, padding_idx=0)
        self.norm = nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.head = Tempered(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.words(x)).tanh()).mean(1))


class Tempered(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / 3)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.temperature


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def deep_head() -> nn.Module:
    head = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), head)


def inputs(name: str, samples: int) -> Tensor:
    if name == "tokens":
        return torch.randint(0, 11, (samples, 4))
    return torch.randn(samples, 2, 6, 6) if name == "cnn" else torch.randn(samples, 6)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "tokens": Tokens,
    "deep_head": deep_head,
}
# What "head" means for each model, said without fastdg: the parameters of its last layer.
HEADS = {"mlp": ["2."], "cnn": ["6."], "tokens": ["head."], "deep_head": ["2.2."]}


def batches(
    name: str, steps: int, domains: int = 4, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Ragged domains; in every third batch one of them is missing, in one the last one."""
    made = []
    for step in range(steps):
        samples = 7 + step % 4
        d = torch.randint(0, domains, (samples,))
        if step % 3 == 1:
            d[d == step % domains] = (step + 1) % domains
        x = inputs(name, samples)
        made.append((x.to(dtype) if x.is_floating_point() else x, torch.randint(3, (samples,)), d))
    return made


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def definition(
    model: nn.Module,
    parameters: Sequence[Tensor],
    make: Callable[[], Optimizer],
    data: Sequence[Batch],
    penalty_weight: float,
    anneal_steps: int,
    ema: float | None = 0.95,
    reduction: str = "mean",
    pre_anneal_weight: float = 0.0,
    reset_base: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The loss and the penalty of each step; trains ``model``."""
    base = make()
    history: dict[int, Tensor] = {}
    for step, (x, y, domains) in enumerate(data):
        losses = [losses_of(model, x[i : i + 1], y[i : i + 1])[0] for i in range(len(x))]
        grads = []
        for one in losses:
            parts = torch.autograd.grad(one, parameters, create_graph=True)
            grads.append(torch.cat([g.flatten() for g in parts]))
        used = []
        for d in sorted(set(domains.tolist())):
            mine = torch.stack([g for g, e in zip(grads, domains.tolist(), strict=True) if e == d])
            v = ((mine - mine.mean(0)) ** 2).mean(0)
            if ema is None:
                used.append(v)
                continue
            old = history.get(d, torch.zeros_like(v))
            history[d] = (ema * old + (1 - ema) * v).detach()
            used.append((ema * old + (1 - ema) * v) / (1 - ema))
        u = torch.stack(used)
        squares = (u - u.mean(0)) ** 2
        penalty = squares.sum() if reduction == "sum" else squares.mean(1).mean()
        weight = penalty_weight if step >= anneal_steps else pre_anneal_weight
        loss = torch.stack(losses).mean()
        if reset_base and step == anneal_steps != 0:
            base = make()
        base.zero_grad()
        (loss + weight * penalty).backward()
        base.step()
        yield loss.detach(), penalty.detach()


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    error = float((got.detach() - expected.detach()).abs().max())
    assert error <= tolerance * scale, f"off by {error:.1e}, largest entry {scale:.1e}"


@pytest.mark.product("name", "which")
@pytest.mark.parametrize("settings", [{}, SCRIPT], ids=["domainbed", "script"])
@pytest.mark.parametrize("num_domains", [None, 4])
@pytest.mark.parametrize("which", ["head", "all", "list"])
@pytest.mark.parametrize("name", MODELS)
def test_definition(name: str, which: str, num_domains: int | None, settings: dict) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = MODELS[name]()
        data = batches(name, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    copied = copy.deepcopy(model)

    def chosen(of: nn.Module) -> list[Tensor]:
        prefixes = {"head": HEADS[name], "all": [""], "list": ["2.", "head", "6.", "mix"]}[which]
        return [p for n, p in of.named_parameters() if n.startswith(tuple(prefixes))]

    settings = {"penalty_weight": 30.0, "anneal_steps": 3, **settings}
    truth = definition(
        copied,
        chosen(copied),
        lambda: Adam(copied.parameters(), lr=1e-2, eps=1e-3),
        data,
        **settings,
    )
    opt = fastdg.Fishr(
        Adam(model.parameters(), lr=1e-2, eps=1e-3),
        params=chosen(model) if which == "list" else which,
        num_domains=num_domains,
        **settings,
    )
    for (x, y, d), (loss, penalty) in zip(data, truth, strict=True):
        opt.zero_grad()
        close(opt.backward(losses_of(model, x, y), d), loss)
        close(opt.statistics["penalty"], penalty)
        opt.step()
    for p, expected in zip(model.parameters(), copied.parameters(), strict=True):
        close(p, expected)


def test_first_steps_by_hand() -> None:
    """The history's scale: u = v, then v + γ v, and not Adam's bias correction."""
    model = nn.Linear(1, 1, bias=False).double()
    opt = fastdg.Fishr(SGD(model.parameters(), lr=0.0), anneal_steps=0, ema=0.5)
    x = torch.tensor([[1.0], [3.0], [0.0], [0.0]]).double()
    penalties = []
    for _ in range(3):
        opt.backward(model(x)[:, 0], torch.tensor([0, 0, 1, 1]))  # g = x: variances 1 and 0
        penalties.append(float(opt.statistics["penalty"]))
        opt.step()
    u = [1.0, 1.5, 1.75]  # v/(1-γ) in the end
    assert penalties == pytest.approx([v**2 / 4 for v in u], abs=1e-15)


def make_opt(model: nn.Module, params: str = "head", **settings: object) -> fastdg.Fishr:
    settings = {"penalty_weight": 20.0, "anneal_steps": 2, **settings}
    return fastdg.Fishr(Adam(model.parameters(), lr=1e-2), params=params, **settings)  # type: ignore[arg-type]


def train(opt: fastdg.Fishr, model: nn.Module, data: Sequence[Batch]) -> list[Tensor]:
    trace = []
    for x, y, d in data:
        opt.zero_grad()
        opt.backward(losses_of(model, x, y), d)
        opt.step()
        trace.append(opt.statistics["objective"])
    return trace


@pytest.mark.parametrize("params", ["head", "all"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_zero_weight_is_plain_training(name: str, params: str) -> None:
    model = MODELS[name]().double()
    plain = copy.deepcopy(model)
    data = batches(name, 6)
    opt = make_opt(model, params, penalty_weight=0.0)
    base = Adam(plain.parameters(), lr=1e-2)
    train(opt, model, data)
    for step, (x, y, _) in enumerate(data):
        if step == 2:  # where Fishr makes Adam anew
            base = Adam(plain.parameters(), lr=1e-2)
        base.zero_grad()
        losses_of(plain, x, y).mean().backward()
        base.step()
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        # A bias before a group norm has no gradient but rounding, which Adam makes a step of
        close(p, expected, 1e-15 if params == "head" else 1e-8)
    assert float(opt.statistics["penalty"]) > 0
    assert opt.state_dict()["state"][len(list(model.parameters())) - 1]["fishr_ema"].abs().sum() > 0


@pytest.mark.parametrize("params", ["head", "all"])
@pytest.mark.parametrize("after", range(5))
def test_resume_is_bit_for_bit(params: str, after: int) -> None:
    """Before, at and after the anneal; in the middle of a history."""
    model = mlp()
    data = batches("mlp", 6, dtype=torch.float32)
    opt = make_opt(model, params)
    train(opt, model, data[:after])
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    whole = train(opt, model, data[after:])

    again = mlp()
    again.load_state_dict(saved[0])
    resumed = make_opt(again, params)
    resumed.load_state_dict(saved[1])
    assert resumed.steps == after
    parts = train(resumed, again, data[after:])
    assert [float(v) for v in parts] == [float(v) for v in whole]
    for p, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, expected)


def test_a_history_of_other_params_is_said() -> None:
    model = mlp()
    data = batches("mlp", 3, dtype=torch.float32)
    opt = make_opt(model, "head")
    train(opt, model, data)
    wider = make_opt(model, "all")
    wider.load_state_dict(opt.state_dict())
    with pytest.warns(UserWarning, match=r"no Fishr history of .* 1 more") as caught:
        train(wider, model, data[:1])
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(wider, model, data[1:])


def test_a_predicate_on_names_that_nobody_knows() -> None:
    model = mlp()
    x, y, d = batches("mlp", 1, dtype=torch.float32)[0]

    def chosen(predicate: Callable[[str, Tensor], bool], **known: nn.Module) -> list[int]:
        opt = fastdg.Fishr(Adam(model.parameters()), params=predicate, **known)
        opt.backward(losses_of(model, x, y), d)
        opt.step()
        return [p.dim() for p in model.parameters() if "fishr_ema" in opt.state[p]]

    assert chosen(lambda name, p: "bias" not in name, model=model) == [2, 2]
    assert chosen(lambda name, p: p.dim() == 1) == [1, 1]
    with pytest.raises(ValueError, match=r"params: .*names .*Pass model="):
        chosen(lambda name, p: "bias" not in name)
    with pytest.raises(ValueError, match=r"params: .*names .*Pass model="):
        chosen(lambda name, p: name.endswith("weight"))


def test_new_domain_starts_without_history() -> None:
    model = mlp()
    opt = make_opt(model, anneal_steps=0)
    data = batches("mlp", 4, domains=2, dtype=torch.float32)
    train(opt, model, data)
    x, y, _ = data[0]
    late = torch.tensor([0, 0, 1, 1, 3, 3, 3])
    train(opt, model, [(x, y, late)])
    ema = opt.state[model[2].weight]["fishr_ema"]
    assert ema.shape == (4, 3, 8)
    assert ema[2].eq(0).all() and ema[3].gt(0).any()
    train(opt, model, data)  # and batches without the new ones go on
    assert opt.statistics["domain_count"].tolist()[2:] == [0, 0]
    assert torch.equal(ema[2:], opt.state[model[2].weight]["fishr_ema"][2:])


@pytest.mark.parametrize("params", ["head", "all"])
def test_one_domain_has_no_penalty(params: str) -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    opt = make_opt(model, params, anneal_steps=0, num_domains=3)
    x, y, _ = batches("mlp", 1, dtype=torch.float32)[0]
    losses_of(plain, x, y).mean().backward()
    opt.backward(losses_of(model, x, y), torch.full((7,), 1))
    assert float(opt.statistics["penalty"]) == 0
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)
    opt.step()
    ema = opt.state[model[2].weight]["fishr_ema"]
    assert ema[[0, 2]].eq(0).all() and ema[1].gt(0).any()


def test_one_sample_has_no_variance() -> None:
    model = mlp()
    opt = make_opt(model, anneal_steps=0, ema=None)
    x, y, _ = batches("mlp", 1, dtype=torch.float32)[0]
    opt.backward(losses_of(model, x[:2], y[:2]), torch.tensor([0, 1]))
    assert float(opt.statistics["penalty"]) == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("params", ["head", "all"])
@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_nan_losses_come_through_and_a_skipped_step_forgets_them(
    params: str, weight: float
) -> None:
    model = mlp()
    opt = make_opt(model, params, anneal_steps=0, penalty_weight=weight)
    data = batches("mlp", 3, dtype=torch.float32)
    train(opt, model, data[:1])
    before = copy.deepcopy(opt.state_dict())
    x, y, d = data[1]
    opt.zero_grad()
    loss = opt.backward(losses_of(model, x * torch.tensor(float("nan")), y), d)
    assert loss.isnan() and opt.statistics["penalty"].isnan()
    assert all(p.grad is not None and p.grad.isnan().any() for p in model.parameters())
    opt.zero_grad()  # as a training loop does that skips such batches
    for key, value in before["state"][2].items():
        assert torch.equal(opt.state_dict()["state"][2][key], value), key
    assert opt.steps == 1
    train(opt, model, data[2:])
    assert all(p.isfinite().all() for p in model.parameters())


def test_infinite_penalty_does_not_reach_the_gradient_before_the_anneal() -> None:
    model = nn.Linear(2, 1)
    opt = make_opt(model, anneal_steps=9)
    x = torch.tensor([[1e15, 0.0], [-1e15, 0.0], [0.0, 1.0], [0.0, 2.0]])
    opt.backward(model(x)[:, 0], torch.tensor([0, 0, 1, 1]))
    assert opt.statistics["penalty"].isinf()
    assert model.weight.grad.isfinite().all()


def test_statistics() -> None:
    model = mlp()
    opt = make_opt(model, anneal_steps=0, num_domains=4)
    x, y, _ = batches("mlp", 1, dtype=torch.float32)[0]
    d = torch.tensor([0, 0, 3, 1, 1, 0, 3])
    losses = losses_of(model, x, y)
    loss = opt.backward(losses, d)
    s = opt.statistics
    assert all(not value.requires_grad for value in s.values()) and not loss.requires_grad
    torch.testing.assert_close(loss, losses.detach().mean())
    torch.testing.assert_close(s["objective"], s["loss"] + 20 * s["penalty"])
    assert s["domain_count"].tolist() == [3, 2, 0, 2]
    assert s["domain_loss"][2].isnan()
    torch.testing.assert_close(s["domain_loss"][3], losses.detach()[[2, 6]].mean())


@functools.cache
def miniature(params: str, backend: str, dtype: torch.dtype) -> tuple[Tensor, nn.Module]:
    """Sixty steps on three domains that differ in noise: the losses and penalties, the model."""
    generator = torch.Generator().manual_seed(1)
    d = torch.arange(36) % 3
    x = torch.randn(36, 2, 6, 6, generator=generator) * (0.5 + 0.5 * d.view(-1, 1, 1, 1))
    y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0].std((1, 2)) > 1)
    torch.manual_seed(2)
    # Smooth: of a ReLU's kink, a sum in another order may see the other side
    smooth = [nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in cnn()]
    model = nn.Sequential(*smooth).to(dtype)
    # SGD: Adam divides by the gradient, and so makes steps of mere rounding
    opt = fastdg.Fishr(
        SGD(model.parameters(), lr=0.05, momentum=0.9),
        params=params,
        anneal_steps=20,
        penalty_weight=0.5,
        num_domains=3,
    )
    trace = []
    with fastdg.use_backend(backend):
        for step in range(60):
            rows = torch.arange(12) + 12 * (step % 3)
            opt.zero_grad()
            loss = opt.backward(losses_of(model, x[rows].to(dtype), y[rows]), d[rows])
            opt.step()
            trace.append(torch.stack([loss, opt.statistics["penalty"]]))
    return torch.stack(trace).double(), model


@pytest.mark.parametrize("backend", [b for b, (there, _) in fastdg.backends().items() if there])
@pytest.mark.parametrize("params", ["head", "all"])
def test_convergence_is_the_same_on_every_backend(params: str, backend: str) -> None:
    truth, exact = miniature(params, "reference", torch.float64)
    plain, _ = miniature(params, "reference", torch.float32)
    got, net = miniature(params, backend, torch.float32)
    assert truth[-3:, 0].mean() < 0.75 * truth[:3, 0].mean()
    # Twice what float32 does to the reference, and a floor for where that is lucky
    scale = truth.abs().amax(0)
    budget = 2 * ((plain - truth).abs() / scale).amax(0) + 2e-5
    assert (((got - truth).abs() / scale).amax(0) <= budget).all()
    for p, expected in zip(net.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=1e-3, atol=1e-4)


def backwards_of(opt: fastdg.Fishr, losses: Tensor, d: Tensor, **more: Any) -> int:
    """Count the gradients of the losses that one `backward` of the optimizer asks for, where the
    plan is known."""
    assert losses.grad_fn is not None
    calls: list[object] = []
    with losses.grad_fn.register_prehook(calls.append):
        opt.backward(losses, d, **more)
    return len(calls)


@pytest.mark.parametrize("name", ["mlp", "cnn", "tokens"])
def test_before_the_anneal_the_head_needs_no_backward_of_its_own(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The step's own one meets the head's gradients: values, .grad and hooks are the same."""
    x, y, d = batches(name, steps=1)[0]
    found = []
    for together in (True, False):
        monkeypatch.setattr(StepBatch, "_is_mean", lambda batch, yes=together: yes)
        monkeypatch.setattr(engine, "_plans", OrderedDict())
        torch.manual_seed(0)
        model = MODELS[name]().double()
        opt = fastdg.Fishr(SGD(model.parameters(), lr=0.1), num_domains=4, anneal_steps=9)
        seen: list[Tensor] = []
        last = list(model.parameters())[-1]
        for _ in range(2):  # plans are made anew in the steps 1, 2, 4 and 8
            opt.backward(losses_of(model, x, y), d)
            opt.zero_grad()
        last.register_hook(seen.append)
        before = torch.randn_like(last)
        last.grad = before.clone()
        assert backwards_of(opt, losses_of(model, x, y), d) == 2 - together
        assert len(seen) == 1  # the parameter's hook, once
        close(last.grad - before, seen[0])
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((grads, opt.statistics["penalty"]))
        opt.step()
    for got, expected in zip(*(grads for grads, _ in found), strict=True):
        close(got, expected)
    close(found[0][1], found[1][1])


def test_micro_batches_take_two_backwards_and_a_scaler_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "_plans", OrderedDict())
    x, y, d = batches("mlp", steps=1)[0]
    model = mlp()
    opt = fastdg.Fishr(SGD(model.parameters(), lr=0.1), num_domains=4)
    for _ in range(2):  # plans are made anew in the steps 1, 2, 4 and 8
        opt.backward(losses_of(model, x.float(), y), d, final=False)
    assert backwards_of(opt, losses_of(model, x.float(), y), d) == 2
    opt.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    opt.backward(losses_of(model, x.float(), y), d)  # the fourth
    opt.zero_grad()
    assert backwards_of(opt, losses_of(model, x.float(), y), d, scaler=scaler) == 1


def test_an_objective_that_raises_after_its_moments_leaves_grad() -> None:
    class Late(fastdg.Fishr):
        prefix = "late"

        def objective(self, batch: Any) -> Tensor:
            super().objective(batch)
            raise ArithmeticError

    x, y, d = batches("mlp", steps=1)[0]
    model = mlp().double()
    opt = Late(SGD(model.parameters(), lr=0.1), num_domains=4)
    before = [torch.randn_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), before, strict=True):
        p.grad = grad.clone()
    with pytest.raises(ArithmeticError):
        opt.backward(losses_of(model, x, y), d)
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is not None and torch.equal(p.grad, grad)
