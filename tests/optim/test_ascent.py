"""SAM and its relatives against plain loops, and what happens between two gradients of a step."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_device import DEVICE
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from torch.optim import SGD, Adam, Optimizer

import fastdg

Grad = Callable[[Tensor], Tensor]  # flat weights -> flat gradient of the mean loss there
TINY = 1e-12


def network(norm: bool = False, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    norms = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *norms, nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    n = 9 + step  # ragged domains
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    domains = torch.randint(3, (n,), generator=generator)
    return x, torch.randint(3, (n,), generator=generator), domains


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


# -- the formulas, on flat vectors --


def unit(g: Tensor) -> Tensor:
    return g / (g.norm() + TINY)


def sam(w: Tensor, grad: Grad, _: Grad) -> Tensor:
    return grad(w + 0.05 * unit(grad(w)))


def asam(w: Tensor, grad: Grad, _: Grad) -> Tensor:
    g = grad(w)
    return grad(w + 0.5 * w.square() * g / ((w.abs() * g).norm() + TINY))


def gsam(w: Tensor, grad: Grad, _: Grad) -> Tensor:
    g = grad(w)
    up = grad(w + 0.05 * unit(g))
    return up - 0.3 * (g - (g @ up) / (up @ up) * up)


def sagm(w: Tensor, grad: Grad, _: Grad) -> Tensor:
    g = grad(w)
    return (g + grad(w + (0.05 / (g.norm() + TINY) - 0.01) * g)) / 2


def gam(w: Tensor, grad: Grad, _: Grad) -> Tensor:
    g0 = grad(w)
    g1 = grad(w + 0.02 * unit(g0))
    there = w + 0.2 * unit(g1 - g0)
    g2 = grad(there)
    g3 = grad(there + 0.02 * unit(g2))
    a, m = 0.9 * g1 + 0.7 * g3, g0 + 0.8 * g2
    return a - 0.1 * (m - (m @ a) / (a @ a) * a)


def disam(w: Tensor, grad: Grad, varied: Grad) -> Tensor:
    return grad(w + 0.05 * unit(varied(w)))


Wrap = Callable[[Optimizer], Any]
KINDS: dict[str, tuple[Wrap, Callable[[Tensor, Grad, Grad], Tensor]]] = {
    "SAM": (fastdg.SAM, sam),
    "ASAM": (lambda base: fastdg.SAM(base, rho=0.5, adaptive=True), asam),
    "GSAM": (lambda base: fastdg.GSAM(base, alpha=0.3), gsam),
    "SAGM": (lambda base: fastdg.SAGM(base, alpha=0.01), sagm),
    "GAM": (lambda base: fastdg.GAM(base, beta1=0.9, beta2=0.8, beta3=0.7, gamma=0.1), gam),
    "DISAM": (lambda base: fastdg.DISAM(base, variance_weight=0.2), disam),
}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(kind: str, steps: int) -> list[Tensor]:
    """The weights after each step of Adam on the formula's gradient."""
    model = network()
    opt, found = Adam(model.parameters(), 1e-2), []

    def gradient(w: Tensor, objective: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        other = copy.deepcopy(model)
        nn.utils.vector_to_parameters(w, other.parameters())
        loss = objective(losses_of(other, x, y), domains)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*other.parameters()])])

    def varied(losses: Tensor, domains: Tensor) -> Tensor:
        means = torch.stack([losses[domains == d].mean() for d in domains.unique()])
        return losses.mean() - 0.2 * means.var(correction=0)

    for step in range(steps):
        x, y, domains = batch(step)
        d = KINDS[kind][1](
            flat(model),
            lambda w: gradient(w, lambda losses, _: losses.mean()),
            lambda w: gradient(w, varied),
        )
        parts = d.split([p.numel() for p in model.parameters()])
        for p, part in zip(model.parameters(), parts, strict=True):
            p.grad = part.view_as(p).clone()
        opt.step()
        found.append(flat(model))
    return found


def by_closure(opt: Any, model: nn.Module, step: int) -> None:
    x, y, domains = batch(step)

    def closure() -> tuple[Tensor, Tensor]:
        opt.zero_grad()
        return losses_of(model, x, y), domains

    opt.step(closure)


def by_closure_with_backward(opt: Any, model: nn.Module, step: int) -> None:
    x, y, domains = batch(step)

    def closure() -> Tensor:
        opt.zero_grad()
        return opt.backward(losses_of(model, x, y), domains)

    opt.step(closure)


def by_calls(opt: Any, model: nn.Module, step: int) -> None:
    x, y, domains = batch(step)
    for point in range(getattr(opt, "points", 2)):
        if point:
            opt.ascend()
        opt.zero_grad()
        opt.backward(losses_of(model, x, y), domains)
    opt.step()


def by_micro_batches(opt: Any, model: nn.Module, step: int) -> None:
    whole = batch(step)
    opt.zero_grad()
    for point in range(opt.points):
        if point:
            opt.ascend()
        for k in range(3):
            x, y, domains = (t.tensor_split(3)[k] for t in whole)
            opt.backward(losses_of(model, x, y), domains, final=k == 2)
    opt.step()


def by_scaler(opt: Any, model: nn.Module, step: int) -> None:
    x, y, domains = batch(step)
    scaler = GradScaler(DEVICE, init_scale=2.0**10)
    opt.zero_grad()
    for point in range(opt.points):
        if point:
            opt.ascend()
        opt.backward(losses_of(model, x, y), domains, scaler=scaler)
    scaler.step(opt)


@pytest.mark.parametrize(
    "make", [by_closure, by_closure_with_backward, by_calls, by_micro_batches, by_scaler]
)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_formula(kind: str, make: Callable[..., None]) -> None:
    model = network()
    opt = KINDS[kind][0](Adam(model.parameters(), 1e-2))
    for step, expected in enumerate(by_hand(kind, 5)):
        make(opt, model, step)
        torch.testing.assert_close(flat(model), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("SAM", lambda a, w: a @ w + 0.05 * a @ a @ w / (a @ w).norm()),
        (
            "SAGM",
            lambda a, w: a @ w + (0.05 / (a @ w).norm() - 0.01) / 2 * (a @ a @ w),
        ),
    ],
)
def test_a_quadratic_has_a_closed_form(kind: str, factor: Callable[..., Tensor]) -> None:
    root = torch.randn(5, 5, dtype=torch.float64)
    a, w = root @ root.t(), nn.Parameter(torch.randn(5, dtype=torch.float64))
    start = w.detach().clone()
    opt = KINDS[kind][0](SGD([w], lr=1.0))
    opt.step(lambda: ((w @ a @ w / 2).expand(4), torch.arange(4) % 2))
    torch.testing.assert_close(start - w.detach(), factor(a, start), rtol=1e-10, atol=1e-12)


# -- between two gradients --


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e-30])  # the square of 1e-30 is 0 in float32
def test_gradients_that_are_zero_leave_the_weights_finite(kind: str, scale: float) -> None:
    model = network(dtype=torch.float32)
    opt, (x, y, domains), before = (
        KINDS[kind][0](SGD(model.parameters(), 0.1)),
        batch(0),
        flat(model),
    )
    opt.step(lambda: (losses_of(model, x.float(), y) * scale, domains))
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_come_back_bit_for_bit(kind: str) -> None:
    model = network(dtype=torch.float32)
    opt = KINDS[kind][0](SGD(model.parameters(), lr=0.0))
    before = flat(model)
    x, y, domains = batch(0, torch.float32)
    for point in range(opt.points):
        if point:
            opt.ascend()
            assert not torch.equal(flat(model), before)
            assert all(p.grad is None for p in model.parameters())
        opt.backward(losses_of(model, x, y), domains)
    assert torch.equal(flat(model), before)
    opt.step()


@pytest.mark.parametrize("calls", [1, 2])
def test_an_error_in_a_closure_puts_all_back(calls: int) -> None:
    model = network(norm=True)
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1))
    before, seen = flat(model), []
    x, y, domains = batch(0)

    def closure() -> tuple[Tensor, Tensor]:
        seen.append(None)
        losses = losses_of(model, x, y)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return losses, domains

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert torch.equal(flat(model), before)
    assert int(model[1].num_batches_tracked) == 1
    opt.step(lambda: (losses_of(model, x, y), domains))


def test_restore_forgets_the_step() -> None:
    model = network()
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1))
    before = flat(model)
    x, y, domains = batch(0)
    opt.backward(losses_of(model, x, y), domains)
    opt.ascend()
    opt.restore()
    assert torch.equal(flat(model), before)
    with pytest.raises(RuntimeError, match=r"SAM\.step\(\) needs a backward"):
        opt.step()
    by_calls(opt, model, 0)


def test_misuse_is_told() -> None:
    model = network()
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1))
    x, y, domains = batch(0)

    def backward(**more: Any) -> None:
        opt.backward(losses_of(model, x, y), domains, **more)

    with pytest.raises(RuntimeError, match=r"^SAM\.ascend\(\): needs a backward"):
        opt.ascend()
    backward(final=False)
    with pytest.raises(RuntimeError, match=r"^SAM\.ascend\(\): needs a backward"):
        opt.ascend()
    backward()
    with pytest.raises(RuntimeError, match=r"^SAM\.step\(\): needs 2 gradients, got 1"):
        opt.step()
    opt.ascend()
    for call in (opt.step, opt.ascend):
        with pytest.raises(RuntimeError, match=r"^SAM\.\w+\(\): needs"):
            call()
    for save in (opt.state_dict, lambda: copy.deepcopy(opt)):
        with pytest.raises(RuntimeError, match=r"^SAM: the model is not at its own weights"):
            save()
    with pytest.raises(RuntimeError, match=r"^scaler: .*same GradScaler"):
        backward(scaler=GradScaler(DEVICE))
    backward()
    with pytest.raises(RuntimeError, match=r"^SAM\.ascend\(\): the 2 gradients"):
        opt.ascend()
    with pytest.raises(RuntimeError, match=r"^losses: the 2 gradients"):
        backward()
    opt.step()
    with pytest.raises(ValueError, match=r"^buffers: expected 'first' or 'all', got 'none'"):
        fastdg.SAM(SGD(model.parameters(), lr=0.1), buffers="none")
    with pytest.raises(ValueError, match=r"^rho: "):
        fastdg.SAM(SGD(model.parameters(), lr=0.1), rho=-1.0)


def test_a_forward_before_the_ascent_is_told() -> None:
    model = network()
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1))
    x, y, domains = batch(0)
    opt.backward(losses_of(model, x, y), domains)
    early = losses_of(model, x, y)
    opt.ascend()
    with pytest.raises(RuntimeError, match=r"^losses: they come from a forward before opt\.ascend"):
        opt.backward(early, domains)
    opt.backward(losses_of(model, x, y), domains)
    opt.step()


@pytest.mark.parametrize("kind", [*KINDS, "SWAD"])
def test_scaled_losses_without_the_scaler_are_refused(kind: str) -> None:
    """Around a plain optimizer, too, which a GradScaler would step itself."""
    model = network(dtype=torch.float32)
    base = SGD(model.parameters(), lr=0.1)
    opt = fastdg.SWAD(base, model) if kind == "SWAD" else KINDS[kind][0](base)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    x, y, domains = batch(0, torch.float32)
    for point in range(getattr(opt, "points", 1)):
        if point:
            opt.ascend()
        opt.backward(scaler.scale(losses_of(model, x, y)), domains)
    with pytest.raises(RuntimeError, match=r"^scaler: .*was given no scaler"):
        scaler.step(opt)


@pytest.mark.parametrize("moved", ["first", "all"])
@pytest.mark.parametrize("compiled", [False, True])
def test_which_forwards_move_buffers(moved: str, compiled: bool) -> None:
    model = network(norm=True)
    run = torch.compile(model, backend="eager") if compiled else model
    known = run if compiled else None
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1), buffers=moved, model=known)
    x, y, domains = batch(0)
    mean = F.linear(x, model[0].weight, model[0].bias).mean(0).detach()
    for point in range(2):
        if point:
            opt.ascend()
        opt.backward(F.cross_entropy(run(x), y, reduction="none"), domains)
    opt.step()
    assert int(model[1].num_batches_tracked) == (1 if moved == "first" else 2)
    first = torch.allclose(model[1].running_mean, 0.1 * mean, rtol=1e-12)
    assert first == (moved == "first")
    model(x)  # no hook stays
    assert int(model[1].num_batches_tracked) == (2 if moved == "first" else 3)


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_without_the_model_its_buffers_are_found_and_no_others() -> None:
    """Of a compiled model, whose modules call no hook; a teacher's stay its own."""
    model, teacher = network(norm=True), network(norm=True)
    run = torch.compile(model, backend="eager")
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1))
    x, y, domains = batch(0)
    for point in range(2):
        if point:
            opt.ascend()
            teacher(x)
        opt.backward(F.cross_entropy(run(x), y, reduction="none"), domains)
    opt.step()
    assert int(model[1].num_batches_tracked) == int(teacher[1].num_batches_tracked) == 1


def test_buffers_of_functional_call() -> None:
    """The first forward alone moves each set of them, and the model keeps its own."""
    model = network(norm=True)
    own = dict(model.named_buffers())
    sets = [{name: b.clone() for name, b in own.items()} for _ in range(2)]
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1))
    x, y, domains = batch(0)

    def losses() -> Tensor:
        called = [functional_call(model, buffers, (x[k::2],)) for k, buffers in enumerate(sets)]
        losses = [F.cross_entropy(z, y[k::2], reduction="none") for k, z in enumerate(called)]
        return torch.cat([*losses, losses_of(model, x, y)])

    opt.backward(losses(), domains.repeat(2))
    after = [{name: b.clone() for name, b in buffers.items()} for buffers in (own, *sets)]
    opt.ascend()
    opt.backward(losses(), domains.repeat(2))
    torch.testing.assert_close([own, *sets], after, rtol=0, atol=0)
    assert all(model.get_buffer(name) is buffer for name, buffer in own.items())


class Replaces(nn.Linear):
    """Puts a new buffer in the place of the one before it."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


@pytest.mark.parametrize("known", [False, True])
def test_buffers_that_a_forward_replaces(known: bool) -> None:
    model = nn.Sequential(Replaces(), nn.Tanh()).double()
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1), model=model if known else None)
    x, y, domains = batch(0)
    opt.backward(losses_of(model, x, y), domains)
    first = model[0].calls
    opt.ascend()
    opt.backward(losses_of(model, x, y), domains, final=False)  # two forwards
    opt.backward(losses_of(model, x, y), domains)
    assert model[0].calls is first
    assert int(first) == 1


def test_an_optimizer_that_is_dropped_leaves_no_hook() -> None:
    hooks = torch_module._global_forward_pre_hooks
    before = len(hooks)
    model = network(norm=True)
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1))
    x, y, domains = batch(0)
    opt.backward(losses_of(model, x, y), domains)
    opt.ascend()
    assert len(hooks) == before + 1
    del opt
    gc.collect()
    assert len(hooks) == before


# -- GradScaler --


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_gradients_that_were_unscaled_before_the_ascent_are_told(
    average: bool, copied: bool
) -> None:
    model = network(dtype=torch.float32)
    opt: Any = fastdg.SAM(SGD(model.parameters(), lr=0.1))
    opt = fastdg.SWAD(opt, model) if average else opt
    if copied:
        model, opt = copy.deepcopy((model, opt))
    scaler = GradScaler("cpu", init_scale=2.0**10)
    x, y, domains = batch(0, torch.float32)
    opt.backward(losses_of(model, x, y), domains, scaler=scaler)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"^scaler: unscale_ was called before SAM\.ascend"):
        opt.ascend()
    opt.zero_grad()
    scaler.update()
    if not average:
        by_scaler(opt, model.double(), 0)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_overflow_at_either_point_skips_the_step(bad: int) -> None:
    model = network(norm=True, dtype=torch.float32)
    opt = fastdg.SAM(fastdg.Fishr(SGD(model.parameters(), lr=0.1, momentum=0.9), num_domains=3))
    scaler = GradScaler(DEVICE, init_scale=2.0**8)
    x, y, domains = batch(0, torch.float32)

    def step(overflow: int | None) -> None:
        opt.zero_grad()
        for point in range(2):
            if point:
                opt.ascend()
            losses = losses_of(model, x, y)
            if point == overflow:
                losses = losses * torch.inf
            opt.backward(losses, domains, scaler=scaler)
        scaler.step(opt)
        scaler.update()

    step(None)
    before, history = flat(model), copy.deepcopy(opt.state_dict()["state"])
    step(bad)
    assert torch.equal(flat(model), before)
    assert scaler.get_scale() == 2.0**7
    for p, entries in opt.state_dict()["state"].items():
        torch.testing.assert_close(entries, history[p], rtol=0, atol=0)
    step(None)
    assert not torch.equal(flat(model), before)
    assert opt.steps == 2


# -- around other wrappers --


def fishr(base: Optimizer) -> fastdg.Fishr:
    return fastdg.Fishr(base, penalty_weight=2.0, anneal_steps=1, ema=0.5, num_domains=3)


def test_around_fishr_its_gradient_is_taken_at_both_weights() -> None:
    """And its history follows the second forward, once a step."""
    model = network()
    opt = fastdg.SAM(fishr(Adam(model.parameters(), 1e-2)))
    other = network()
    plain = fishr(Adam(other.parameters(), 1e-2))
    for step in range(4):
        x, y, domains = batch(step)
        by_calls(opt, model, step)
        probe = copy.deepcopy(plain)
        inner = [p for group in probe.param_groups for p in group["params"]]
        shadow = network()
        shadow.load_state_dict(other.state_dict())
        for p, q in zip(inner, shadow.parameters(), strict=True):
            p.data = q.data  # the copy of the optimizer trains the copy of the model
        shadow = rebuilt(shadow, inner)
        probe.zero_grad()
        probe.backward(losses_of(shadow, x, y), domains)
        g = torch.cat([p.grad.flatten() for p in inner])
        start = flat(other)
        nn.utils.vector_to_parameters(start + 0.05 * unit(g), other.parameters())
        plain.zero_grad()
        plain.backward(losses_of(other, x, y), domains)
        with torch.no_grad():
            parts = start.split([p.numel() for p in other.parameters()])
            for p, part in zip(other.parameters(), parts, strict=True):
                p.copy_(part.view_as(p))
        plain.step()
        torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-12)
        mine, its = opt.state_dict()["state"], plain.state_dict()["state"]
        for p, entries in its.items():
            torch.testing.assert_close(mine[p], entries, rtol=0, atol=1e-12)
    assert {"penalty", "ascended_loss", "gradient_norm"} <= opt.statistics.keys()


def rebuilt(model: nn.Sequential, parameters: list[Any]) -> nn.Sequential:
    """The model with these parameters."""
    names = [name for name, _ in model.named_parameters()]
    for name, p in zip(names, parameters, strict=True):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, p)
    return model


def test_swad_goes_around_it() -> None:
    model = network()
    opt = fastdg.SWAD(fastdg.SAM(fishr(Adam(model.parameters(), 1e-2))), model)
    seen = []
    for step in range(3):
        make = by_closure if step % 2 else by_calls
        make(opt, model, step)
        seen.append(flat(model))
    opt.evaluate(1.0)
    with opt.applied():
        mean = flat(model)
    torch.testing.assert_close(mean, torch.stack(seen).mean(0))
    assert "ascended_loss" in opt.statistics


def mldg(base: Optimizer) -> fastdg.MLDG:
    return fastdg.MLDG(base, num_domains=3)


def test_what_it_goes_around() -> None:
    model = network()
    base = SGD(model.parameters(), lr=0.1)
    for outer, inner in [
        (fastdg.Fishr, fastdg.SAM),
        (fastdg.SAM, fastdg.SAM),
        (fastdg.GSAM, fastdg.SAM),
        (fastdg.DISAM, fastdg.Fishr),
        (fastdg.SAM, lambda base: fastdg.SWAD(base, model)),
        (lambda base: fastdg.MIRO(base, model, layers=["0"]), fastdg.SAM),
        (fastdg.SAM, fastdg.GGA),
        (fastdg.GAM, fastdg.GGA),
        (mldg, fastdg.GGA),
        (mldg, fastdg.VREx),
        (mldg, lambda base: fastdg.PGrad(base, num_domains=3)),
        (fastdg.SAM, mldg),
        (fastdg.Fishr, mldg),
    ]:
        with pytest.raises(TypeError, match=r"^base: \w+ cannot go around (another )?\w+: "):
            outer(inner(base))
    with pytest.raises(ValueError, match=r"^num_domains: expected 3"):
        fastdg.SAM(fishr(base), num_domains=4)


@pytest.mark.parametrize("inner", ["Fish", "PGrad"])
def test_inside_iterations_each_step_is_an_ascent(inner: str) -> None:
    """Against a step on the gradient at the worst weights, taken by hand."""
    kinds = {
        "Fish": lambda base: fastdg.Fish(base, num_domains=2),
        "PGrad": lambda base: fastdg.PGrad(base, num_domains=2, splits=2),
    }
    model = network()
    twin = copy.deepcopy(model)
    opt = fastdg.SAM(kinds[inner](SGD(model.parameters(), lr=0.1)))
    alone = kinds[inner](SGD(twin.parameters(), lr=0.1))
    for k in range(8):
        x, y, _ = batch(k)
        opt.zero_grad()
        opt.step(lambda d=k % 2, x=x, y=y: (losses_of(model, x, y), d))
        moved = copy.deepcopy(twin)
        first = torch.autograd.grad(losses_of(twin, x, y).mean(), [*twin.parameters()])
        norm = torch.cat([g.flatten() for g in first]).norm()
        with torch.no_grad():
            for p, g in zip(moved.parameters(), first, strict=True):
                p.add_(0.05 * g / norm)
        worst = torch.autograd.grad(losses_of(moved, x, y).mean(), [*moved.parameters()])
        alone.zero_grad()
        alone.backward(losses_of(twin, x, y), k % 2)
        for p, g in zip(twin.parameters(), worst, strict=True):
            p.grad.copy_(g)
        alone.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_a_term_inside_is_ascended_too() -> None:
    model = network()
    miro = fastdg.MIRO(SGD(model.parameters(), lr=0.1), model, network(), layers=["0"], weight=3.0)
    opt = fastdg.SAM(miro)
    by_closure(opt, model, 0)
    assert "miro" in opt.statistics
    assert opt.statistics["ascended_loss"] > opt.statistics["loss"]


# -- what is kept --


@pytest.mark.parametrize("kind", ["SAM", "GAM"])
def test_a_saved_run_goes_on_bit_for_bit(kind: str) -> None:
    model = network()
    opt = KINDS[kind][0](Adam(model.parameters(), 1e-2))
    for step in range(2):
        by_closure(opt, model, step)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    by_closure(opt, model, 2)
    other = network()
    again = KINDS[kind][0](Adam(other.parameters(), 1e-2))
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.steps == 2
    by_closure(again, other, 2)
    assert torch.equal(flat(model), flat(other))


def test_parameters_that_one_forward_does_not_use() -> None:
    """And frozen ones, which stay; a sparse gradient stays sparse."""
    torch.manual_seed(0)
    table, head, late = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3), nn.Linear(3, 3)
    head.bias.requires_grad_(False)
    parameters = [*table.parameters(), *head.parameters(), *late.parameters()]
    opt = fastdg.SAM(SGD(parameters, lr=0.1))
    before = [p.detach().clone() for p in parameters]
    tokens, y = torch.arange(6), torch.arange(6) % 3
    for point in range(2):
        if point:
            opt.ascend()
        scores = head(table(tokens))
        scores = late(scores) if point else scores
        opt.backward(F.cross_entropy(scores, y, reduction="none"), y)
    assert table.weight.grad is not None and table.weight.grad.is_sparse
    assert head.bias.grad is None and late.weight.grad is not None
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    opt.step()
    changed = [not torch.equal(p, b) for p, b in zip(parameters, before, strict=True)]
    assert changed == [True, True, False, True, True]
    torch.testing.assert_close(table.weight[6], before[0][6])


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_gradient_in_float16(kind: str) -> None:
    model = network(dtype=torch.float16)
    opt, (x, y, domains) = KINDS[kind][0](SGD(model.parameters(), 0.1)), batch(0)
    opt.step(lambda: (losses_of(model, x.half(), y).float() * 1e-6, domains))
    assert opt.statistics["gradient_norm"] < 1 / 65504  # its inverse is above float16
    assert flat(model).isfinite().all()


def test_bfloat16_and_several_groups() -> None:
    model = network(dtype=torch.bfloat16)
    groups = [{"params": [p], "lr": 0.1 * k} for k, p in enumerate(model.parameters())]
    opt = fastdg.GSAM(SGD(groups, lr=0.1))
    before = flat(model)
    by_dtype = batch(0, torch.bfloat16)
    opt.step(lambda: (losses_of(model, *by_dtype[:2]), by_dtype[2]))
    assert flat(model).isfinite().all() and not torch.equal(flat(model), before)
    assert opt.statistics["gradient_norm"].dtype is torch.float32


def test_compiled_is_refused_in_words() -> None:
    model = network()
    opt = fastdg.SAM(SGD(model.parameters(), lr=0.1), num_domains=3)
    with pytest.raises(TypeError, match=r"^opt: .*SAM.*torch\.compile"):
        fastdg.compiled(opt, lambda x, y: losses_of(model, x, y))
