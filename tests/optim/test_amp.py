"""``torch.amp.GradScaler``, autocast: a factor that leaves no trace, steps that are skipped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import WRAPS, Wrap, batch, even, network, same
from definitions import Net, batches, losses_of
from on_device import DEVICE
from scalers import MAKES, STEPS, WRAPPERS, Forward, alike, flat, start, train
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer

import fastdg


@pytest.fixture(params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest) -> Wrap:
    return WRAPPERS[request.param]


@pytest.mark.product
@pytest.mark.parametrize(
    ("make", "clip"), [("foreach", None), ("fused", None), ("fused", 1e-3)], ids=str
)
def test_no_scale_leaves_a_trace(wrapper: Wrap, make: str, clip: float | None) -> None:
    """In float32 a power of two comes out of everything again: weights, states, statistics."""
    model, opt = start(wrapper, MAKES[make])
    train(model, opt, range(STEPS), clip=clip)
    for scale in (1.0, 4096.0, 65536.0):
        model2, opt2 = start(wrapper, MAKES[make])
        train(model2, opt2, range(STEPS), GradScaler(DEVICE, init_scale=scale), clip)
        same(model, model2)
        alike(opt.state_dict(), opt2.state_dict())
        alike(opt.statistics, opt2.statistics)


@pytest.mark.product
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("how", ["mixed", "a forward a domain"])
@pytest.mark.parametrize("name", ["Fishr", "Fishr-all", "AgrSum", "PCGrad", "IGA", "VREx"])
def test_all_kinds_of_layers(name: str, how: str, sparse: bool) -> None:
    """Convolutions, norms, a table, a module without a rule; a tensor that is not trained here."""
    if sparse and name == "IGA":
        pytest.skip("a sparse gradient has no second derivative")
    found = []
    for scaler in (None, GradScaler(DEVICE, init_scale=4096.0)):
        torch.manual_seed(1)
        model = Net()
        model.words.sparse = sparse
        own = [p for key, p in model.named_parameters() if not key.startswith("down")]
        opt = WRAPPERS[name](SGD(own, lr=0.05))
        data = batches(3)
        for x, y, domains in data:
            opt.zero_grad()
            x, ids = x.float(), domains.unique().tolist()
            for d in ids if how != "mixed" else ids[-1:]:
                some = domains == d if how != "mixed" else slice(None)
                losses = losses_of(model, x[some], y[some])
                opt.backward(losses, domains[some], final=d == ids[-1], scaler=scaler)
            if scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
        found.append((model.state_dict(), opt.state_dict(), opt.statistics))
        assert model.down.weight.grad is not None
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    alike(*found)


def under(dtype: torch.dtype, weight: float = 1.0) -> Forward:
    def forward(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            losses, domains = batch(model, seed)
        return losses * weight, domains

    return forward


def plain(p: Any) -> Optimizer:
    return SGD(p, lr=0.05)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 0.1)], ids=["fp16", "bf16"]
)
def test_autocast(wrapper: Wrap, dtype: torch.dtype, tolerance: float) -> None:
    """The way that the weights go is that of float32, up to rounding."""
    model, opt = start(wrapper, plain)
    model2, opt2 = start(wrapper, plain)
    before = flat(model.parameters())
    train(model, opt, range(3))
    train(model2, opt2, range(3), GradScaler(DEVICE, init_scale=4096.0), forward=under(dtype))
    way, way2 = flat(model.parameters()) - before, flat(model2.parameters()) - before
    assert (way2 - way).norm() < tolerance * way.norm()


def test_small_gradients_survive_in_half_precision(wrapper: Wrap) -> None:
    found = []
    for scaler in (None, GradScaler(DEVICE, init_scale=65536.0)):
        model, opt = start(wrapper, plain)
        dtype = torch.float32 if scaler is None else torch.float16
        opt.zero_grad()
        opt.backward(*under(dtype, 1e-7)(model, 0), scaler=scaler)
        if scaler is not None:
            scaler.unscale_(opt)
        found.append(flat(p.grad for p in model.parameters()))
    assert (found[1] - found[0]).norm() < 1e-2 * found[0].norm()


def test_small_gradients_are_lost_without_a_scaler() -> None:
    model, opt = start(WRAPPERS["GroupDRO"])
    opt.backward(*under(torch.float16, 1e-8)(model, 0))
    assert not flat(p.grad for p in model.parameters()).any()
    for name in ("Fishr-all", "AgrSum"):
        model, opt = start(WRAPPERS[name])
        opt.backward(*under(torch.float16, 1e-9)(model, 0))
        assert not flat(p.grad for p in model.parameters()).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["losses", "logits"])
def test_halves_after_a_float_head_take_no_precision_before_the_anneal(
    where: str, dtype: torch.dtype
) -> None:
    """The backward of the mean loss would round 1 / 301 to a half, or 1e-5 / 301 to 0."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x, y, d = torch.randn(301, 6), torch.randint(3, (301,)), torch.randint(4, (301,))
    z = model(x)
    z = z.to(dtype).float() if where == "logits" else z
    losses = 1e-5 * F.cross_entropy(z, y, reduction="none")
    losses = losses.to(dtype) if where == "losses" else losses
    one = [torch.autograd.grad(x, model.weight, retain_graph=True)[0] for x in losses]
    grads = torch.stack(one).double()
    opt = fastdg.Fishr(SGD(model.parameters(), lr=0.1), ema=0.0, num_domains=4)
    opt.backward(losses, d)
    opt.step()
    for k, variance in enumerate(opt.state[model.weight]["fishr_ema"]):
        expected = grads[d == k].var(0, unbiased=False)
        assert (variance - expected).abs().max() < 1e-5 * expected.max()


def test_many_losses_in_float16_before_the_anneal() -> None:
    """Their number, 70001, is above float16's largest."""
    model = nn.Linear(2, 2)
    losses = model(torch.randn(70001, 2)).square().sum(1).half()
    opt = fastdg.Fishr(SGD(model.parameters(), lr=0.1))
    opt.backward(losses, torch.arange(70001) % 2)
    assert opt.statistics["penalty"].isfinite()


@pytest.mark.parametrize("share", [1.0, 1e-5])
@pytest.mark.parametrize("name", ["Fishr", "IGA"])
def test_second_derivatives_in_half_precision(name: str, share: float) -> None:
    """Where the penalty is most of the gradient, however small that is."""
    found = []
    for scaler in (None, GradScaler(DEVICE, init_scale=65536.0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        model.append(nn.Linear(32, 5))
        base = plain(model.parameters())
        opt: Any = fastdg.IGA(base, penalty_weight=2 / share)
        if name == "Fishr":
            weight = 1e5 / share**3
            opt = fastdg.Fishr(base, params="all", anneal_steps=0, penalty_weight=weight)
        x, y = torch.randn(48, 8), torch.randint(5, (48,))
        with torch.autocast(DEVICE, torch.float16, enabled=scaler is not None):
            losses = F.cross_entropy(model(x), y, reduction="none")
        opt.backward(share * losses, torch.arange(48) % 3, scaler=scaler)
        assert opt.statistics["objective"] > 1.2 * opt.statistics["loss"]
        if scaler is not None:
            scaler.unscale_(opt)
        found.append(flat(p.grad for p in model.parameters()))
    assert (found[1] - found[0]).norm() < 5e-3 * found[0].norm()


# -- skipped steps --


def poisoned(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """One sample is infinite."""
    losses, domains = batch(model, seed)
    weight = torch.ones_like(losses)
    weight[seed % len(losses)] = torch.inf
    return losses * weight, domains


@pytest.mark.product
@pytest.mark.parametrize("make", MAKES)
def test_a_skipped_step_leaves_no_trace(wrapper: Wrap, make: str) -> None:
    """Weights and states are those before it, and the run goes on as if it had not been."""
    if wrapper is WRAPPERS["Fish"]:
        pytest.skip("its steps are counted: test_fish_as_the_papers_loop_makes_its_steps")
    model, opt = start(wrapper, MAKES[make])
    train(model, opt, range(STEPS))
    model2, opt2 = start(wrapper, MAKES[make])
    scaler = GradScaler(DEVICE, init_scale=4096.0)
    train(model2, opt2, range(2), scaler)
    for times, unscale in enumerate((None, 1.0)):
        before = copy.deepcopy((model2.state_dict(), opt2.state_dict()))
        opt2.zero_grad()
        opt2.backward(*batch(model2, 8), final=False, scaler=scaler)
        opt2.backward(*poisoned(model2, 9), scaler=scaler)
        if unscale is not None:
            scaler.unscale_(opt2)
        scaler.step(opt2)
        scaler.update()
        alike(before, (model2.state_dict(), opt2.state_dict()))
        assert scaler.get_scale() == 2048.0 / 2**times
    train(model2, opt2, range(2, STEPS), scaler)
    same(model, model2)
    alike(opt.state_dict(), opt2.state_dict())


def test_an_overflow_in_half_precision_is_skipped() -> None:
    """The scale comes down until nothing overflows, and only then a step is made."""
    model, opt = start(WRAPPERS["Fishr-all"])
    scaler = GradScaler(DEVICE, init_scale=2.0**40)
    taken = []
    for _ in range(40):
        train(model, opt, [0], scaler, forward=under(torch.float16))
        taken.append(opt.steps)
    assert taken[10] == 0 and taken[-1] > 3
    assert all(x.isfinite().all() for x in opt.state_dict()["state"][0].values())
    assert flat(model.parameters()).isfinite().all()


def test_a_scale_that_grows_until_something_overflows(wrapper: Wrap) -> None:
    """Again and again: what is skipped is all that is lost."""
    model, opt = start(wrapper)
    scaler = GradScaler(DEVICE, init_scale=2.0**22, growth_interval=2)
    skipped = 0
    for seed in range(12):
        before = scaler.get_scale()
        train(model, opt, [seed], scaler, forward=under(torch.float16))
        skipped += scaler.get_scale() < before
    assert 0 < skipped < 12 and opt.steps == 12 - skipped
    assert flat(model.parameters()).isfinite().all()


def test_statistics_that_overflow_skip_the_step() -> None:
    """The gradient is finite, the variances are not: none of both goes anywhere."""
    model, opt = start(WRAPPERS["Fishr-all"], plain)
    scaler = GradScaler(DEVICE, init_scale=1.0)
    train(model, opt, range(1), scaler)
    before = copy.deepcopy((model.state_dict(), opt.state_dict()))
    opt.zero_grad()
    losses, domains = batch(model, 4)
    weight = torch.tensor([1e25, -1e25]).repeat(5)[:9]
    opt.backward(losses * weight, domains)
    assert flat(p.grad for p in model.parameters()).isfinite().all()
    assert not opt.statistics["penalty"].isfinite()
    opt.zero_grad()
    losses, domains = batch(model, 4)
    opt.backward(losses * weight, domains, scaler=scaler)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 0.5
    alike(before, (model.state_dict(), opt.state_dict()))


def test_a_weighting_is_not_shown_what_overflows() -> None:
    def solver(gram: Tensor) -> Tensor:
        assert gram.isfinite().all()
        return even(gram)

    model, opt = start(lambda base: fastdg.GramSurgery(base, solver))
    scaler = GradScaler(DEVICE, init_scale=4.0)
    train(model, opt, range(2), scaler, forward=poisoned)
    assert scaler.get_scale() == 1.0 and opt.steps == 0


def test_fish_as_the_papers_loop_makes_its_steps() -> None:
    """With a second network for the inner steps, and a scaler that skips the one it skips."""

    def losses_of(model: nn.Module, step: int, d: int) -> Tensor:
        # A first, a middle, a last inner step, and a whole meta-iteration are skipped
        bad = (step, d) in {(0, 0), (2, 1), (3, 2), (5, 0), (5, 1), (5, 2)}
        return (poisoned if bad else batch)(model, 3 * step + d)[0]

    torch.manual_seed(1)
    model = network()
    slow, fast = copy.deepcopy(model), copy.deepcopy(model)
    base = MAKES["foreach"](fast.parameters())
    opt = fastdg.Fish(
        MAKES["foreach"](model.parameters()), num_domains=3, meta_lr=0.5, inner_product=True
    )
    scalers = GradScaler(DEVICE, init_scale=4096.0), GradScaler(DEVICE, init_scale=4096.0)
    for step in range(7):
        for d in range(3):
            base.zero_grad()
            scalers[0].scale(losses_of(fast, step, d).mean()).backward()
            scalers[0].step(base)
            scalers[0].update()
            opt.zero_grad()
            losses = losses_of(model, step, d)
            opt.backward(losses, torch.full((len(losses),), d), scaler=scalers[1])
            scalers[1].step(opt)
            scalers[1].update()
        with torch.no_grad():
            for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
                p += 0.5 * (q - p)
                q.copy_(p)
        torch.testing.assert_close(flat(model.parameters()), flat(slow.parameters()))
        assert opt.position == 0
        assert all(opt.statistics[key].isfinite() for key in ("trajectory", "inner_product"))
        assert (opt.statistics["trajectory"] == 0) == (step == 5)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 4096.0 / 2**6


def test_fish_sums_products_of_unscaled_gradients() -> None:
    for make in MAKES.values():
        found = []
        for scaler in (None, GradScaler(DEVICE, init_scale=4096.0)):
            model, opt = start(lambda base: WRAPS["Fish"](base, inner_product=True), make)
            train(model, opt, range(3), scaler)
            found.append(opt.statistics)
        alike(*found)
