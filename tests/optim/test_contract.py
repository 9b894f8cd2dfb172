"""What a wrapped optimizer owes to PyTorch, on every optimizer it may wrap."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bases import BASES, Case, Make, batch, emas, network, same, shared, steps, wrap
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

pytestmark = pytest.mark.product  # of wrappers, the optimizers inside and what a row adds


def test_is_an_optimizer_and_shares_everything_with_the_one_inside(case: Case) -> None:
    _, opt = case.trained()
    assert isinstance(opt, Optimizer)
    shared(opt)
    opt.load_state_dict(opt.state_dict())
    shared(opt)
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    shared(opt)
    assert opt.base.param_groups[-1]["lr"] == 0.5
    shared(copy.deepcopy(opt))
    shared(pickle.loads(pickle.dumps(opt)))
    opt.param_groups[0]["lr"] = 0.125
    assert opt.base.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda epoch: 0.5**epoch),
        lambda o: CosineAnnealingWarmRestarts(o, T_0=2),
        lambda o: ReduceLROnPlateau(o, patience=0),
    ],
    ids=["lambda", "restarts", "plateau"],
)
def test_schedulers(case: Case, schedule: Callable[[Optimizer], Any], when: str) -> None:
    """Made for the wrapper or, before it, for the optimizer inside: the same rates, no warning."""
    model, plain = network(), network()
    reference = case.make(plain.parameters())
    expected = schedule(reference)
    base = case.make(model.parameters())
    early = schedule(base) if when == "before" else None
    if "initial_lr" in base.param_groups[0] and "MIRO" in case.wrapper:
        with pytest.raises(ValueError, match=r"^base: .*scheduler"):
            case.wrap(base)
        return
    opt = case.wrap(base)
    scheduler = schedule(opt) if early is None else early
    for seed in range(5):
        batch(plain)[0].mean().backward()
        reference.step()
        steps(model, opt, [seed])
        for s in (expected, scheduler):
            s.step(1.0) if isinstance(s, ReduceLROnPlateau) else s.step()
        assert opt.param_groups[0]["lr"] == opt.base.param_groups[0]["lr"]
        assert opt.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


def test_schedulers_that_move_momentum() -> None:
    model = network()
    opt = wrap(SGD(model.parameters(), lr=0.1, momentum=0.9))
    scheduler = OneCycleLR(opt, max_lr=0.1, total_steps=4)
    seen = []
    for seed in range(4):
        steps(model, opt, [seed])
        seen.append(opt.base.param_groups[0]["momentum"])
        if seed < 3:
            scheduler.step()
    assert len(set(seen)) > 1


def test_step_without_backward(case: Case) -> None:
    model = network()
    opt = case.wrap(case.make(model.parameters()))
    batch(model)[0].mean().backward()
    with pytest.raises(RuntimeError, match=r"opt\.backward\(losses, domains\)"):
        opt.step()
    opt.zero_grad()
    steps(model, opt, [0])
    with pytest.raises(RuntimeError, match="needs a backward"):
        opt.step()
    opt.backward(*batch(model), final=False)
    with pytest.raises(RuntimeError, match="needs a final backward"):
        opt.step()


def test_unknown_attributes_are_not_the_inner_ones() -> None:
    opt = wrap(BASES["fused_adamw"](network().parameters()))
    assert hasattr(opt.base, "_init_group")
    assert not hasattr(opt, "_init_group")


def test_closure(case: Case) -> None:
    model, opt = case.trained()
    model2, opt2 = copy.deepcopy((model, opt))
    calls = []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        return batch(model, 7)

    with torch.no_grad():
        loss = opt.step(closure)
    steps(model2, opt2, [7])
    assert calls == [True]
    assert torch.equal(loss, opt2.statistics["loss"])
    same(model, model2)
    with pytest.raises(TypeError, match=r"^closure: .*\(losses, domains\)"):
        opt.step(lambda: batch(model)[0].mean())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_backward_where_gradients_are_off(case: Case, mode: Any) -> None:
    model, opt = case.trained()
    model2, opt2 = copy.deepcopy((model, opt))
    opt.zero_grad()
    losses, domains = batch(model, 7)
    with mode():
        opt.backward(losses, domains)
    assert not any(p.grad.is_inference() for p in model.parameters() if p.grad is not None)
    opt.step()
    steps(model2, opt2, [7])
    same(model, model2)


def test_closure_that_calls_backward_itself(case: Case) -> None:
    model, opt = case.trained()
    model2, opt2 = copy.deepcopy((model, opt))

    def closure() -> str:
        opt.zero_grad()
        opt.backward(*batch(model, 7))
        return "what it says"

    assert opt.step(closure) == "what it says"
    steps(model2, opt2, [7])
    same(model, model2)
    opt.zero_grad()
    opt.backward(*batch(model, 8))
    assert opt.step(lambda: None) is None  # backward was called before
    steps(model2, opt2, [8])
    same(model, model2)
    with pytest.raises(RuntimeError, match=r"needs a backward: the closure returned None"):
        opt.step(lambda: None)
    opt.backward(*batch(model, 9))
    with pytest.raises(TypeError, match=r"^closure: .*opt\.backward\(losses, domains\)"):
        opt.step(lambda: batch(model)[0].mean())


def test_hooks_fire_once(case: Case) -> None:
    model, opt = case.trained()
    fired: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args: fired.append(name)

    kinds = ("step_pre", "step_post", "state_dict_pre", "state_dict_post")
    loads = ("load_state_dict_pre", "load_state_dict_post")
    handles = [getattr(opt, f"register_{kind}_hook")(note(kind)) for kind in (*kinds, *loads)]
    steps(model, opt, [0])
    assert fired == ["step_pre", "step_post"]
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert fired[2:] == ["state_dict_pre", "state_dict_post", *loads]
    for handle in handles:
        handle.remove()
    inner = opt.base.register_step_post_hook(note("inner"))
    steps(model, opt, [1])
    assert fired[6:] == ["inner"]
    inner.remove()


def test_add_param_group(make: Make) -> None:
    """New layers are trained by both terms."""
    body, head = nn.Linear(4, 5), nn.Linear(5, 3)
    opt = wrap(make(body.parameters()), anneal_steps=1)
    steps(body, opt, range(2))
    assert opt.state[body.weight]["fishr_ema"].shape == (3, 5, 4)
    before = copy.deepcopy(head)
    opt.add_param_group({"params": head.parameters()})
    model = nn.Sequential(body, nn.Tanh(), head)
    steps(model, opt, range(2))
    assert opt.steps == 4
    assert opt.state[head.weight]["fishr_ema"].shape == (3, 3, 5)  # "head" is the new one
    assert not torch.equal(head.weight, before.weight)


def test_add_param_group_behind_the_wrapper() -> None:
    body, head = nn.Linear(4, 5), nn.Linear(5, 3)
    opt = wrap(Adam(body.parameters()))
    model = nn.Sequential(body, head)
    opt.base.add_param_group({"params": head.parameters()})
    steps(model, opt, range(1))
    assert "fishr_ema" in opt.state[head.weight]


def test_late_unfrozen_parameters(make: Make) -> None:
    model = network()
    model[0].requires_grad_(False)
    opt = wrap(make(model.parameters()), params="all")
    steps(model, opt, range(3))
    assert model[0].weight.grad is None
    assert len(emas(opt)) == 2
    frozen = model[0].weight.clone()
    model[0].requires_grad_(True)
    steps(model, opt, range(3))
    assert not torch.equal(model[0].weight, frozen)
    assert len(emas(opt)) == 4


@pytest.mark.parametrize("params", ["head", "all"])
@pytest.mark.parametrize("weight", [0.0, 5.0])
def test_frozen_and_unused_parameters_keep_no_gradient(
    make: Make, params: str, weight: float
) -> None:
    model, unused = network(), nn.Linear(2, 2)
    model[2].bias.requires_grad_(False)
    empty = nn.Parameter(torch.zeros(0, 3))
    opt = wrap(
        make([*model.parameters(), *unused.parameters(), empty]),
        params=params,
        anneal_steps=0,
        penalty_weight=weight,
    )
    steps(model, opt, range(3))
    for p in (model[2].bias, *unused.parameters(), empty):
        assert p.grad is None
        assert "fishr_ema" not in opt.state.get(p, {})
    assert model[0].weight.grad is not None


def test_what_is_frozen_or_not_used_keeps_no_gradient_and_no_state(case: Case) -> None:
    model, unused = network(), nn.Linear(2, 2)
    model[0].requires_grad_(False)
    empty = nn.Parameter(torch.zeros(0, 3))
    opt = case.wrap(case.make([*model.parameters(), *unused.parameters(), empty]))
    born = {p for p in opt.state if opt.state[p]}  # with its state, as Adagrad's are
    steps(model, opt, range(3))
    for p in (*model[0].parameters(), *unused.parameters(), empty):
        assert p.grad is None
        assert p in born or not opt.state.get(p)
    frozen = model[0].weight.clone()
    model[0].requires_grad_(True)
    steps(model, opt, range(3))
    assert not torch.equal(model[0].weight, frozen)


def test_reset_starts_the_inner_optimizer_anew_in_place(make: Make) -> None:
    model = network()
    opt = wrap(make(model.parameters()), anneal_steps=2)
    scheduler = LambdaLR(opt, lambda epoch: 0.5)
    base = opt.base
    steps(model, opt, range(2))
    scheduler.step()
    history = [ema.clone() for ema in emas(opt)]
    twin = copy.deepcopy(model)
    fresh = make(twin.parameters())
    fresh.param_groups[0]["lr"] = opt.param_groups[0]["lr"]
    opt.zero_grad()
    opt.backward(*batch(model, 5))
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    fresh.step()
    opt.step()
    same(model, twin)
    assert opt.base is base and opt.steps == 3
    for old, new in zip(history, emas(opt), strict=True):
        assert new.gt(0.9 * old).any()
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        assert fresh.state[p].keys() <= opt.state[q].keys()


def test_zero_grad(case: Case) -> None:
    model, opt = case.trained()
    opt.zero_grad(set_to_none=False)
    assert all(p.grad.eq(0).all() for p in model.parameters())
    opt.backward(*batch(model, 3), final=False)
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    opt.backward(*batch(model, 4))
    assert int(opt.statistics["domain_count"].sum()) == 9  # nothing of what was staged
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="needs a backward"):
        opt.step()


def test_the_optimizer_inside_is_not_stepped_behind_its_wrapper(case: Case) -> None:
    model, opt = case.trained()
    before = copy.deepcopy(model)
    opt.zero_grad()
    opt.backward(*batch(model, 3))
    name, inner = type(opt).__name__, type(opt.base).__name__
    with pytest.raises(
        RuntimeError,
        match=rf"{inner}\.step\(\) was called while .grad holds the gradient of {name}",
    ):
        opt.base.step()
    same(model, before)
    taken = opt.steps
    opt.step()
    assert opt.steps == taken + 1
    opt.zero_grad()
    batch(model, 4)[0].mean().backward()
    if not hasattr(opt.base, "base"):
        opt.base.step()  # without the wrapper, as one may want to


def test_a_gradient_that_others_have_cleared_is_not_the_wrappers(case: Case) -> None:
    model, opt = case.trained()
    opt.zero_grad()
    opt.backward(*batch(model, 3))
    model.zero_grad()
    innermost = opt
    while hasattr(innermost, "base"):
        innermost = innermost.base
    batch(model, 4)[0].mean().backward()
    innermost.step()


def test_repr(case: Case) -> None:
    opt = case.wrap(case.make(network().parameters()), num_domains=3)
    text = repr(opt)
    for part in (f"{type(opt).__name__}(", "num_domains=3", type(opt.base).__name__, "_steps: 0"):
        assert part in text
    assert text.count(f"{opt.prefix}_") == 1  # the group's other keys are shown once, above
    for name, value in opt.settings().items():
        assert f"{name}={value!r}" in text


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    torch._dynamo.reset()
    yield lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch in itself
@pytest.mark.parametrize("name", ["Fishr", "AgrRand", "Fish", "GroupDRO"])
def test_compiled_step(name: str, graphs: Callable[[], int]) -> None:
    """Equal to the eager one, and no new graph once it has settled."""
    model, opt = Case(name, "adam").trained()
    model2, opt2 = copy.deepcopy((model, opt))
    compiled = torch.compile(opt2.step, backend="aot_eager")
    counts = []
    for seed in range(8):
        steps(model, opt, [seed])
        opt2.zero_grad()
        opt2.backward(*batch(model2, seed))
        compiled()
        counts.append(graphs())
    for p, q in zip(model.parameters(), model2.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=4e-6)
    assert counts[3] == counts[-1], counts
    assert opt.steps == opt2.steps
