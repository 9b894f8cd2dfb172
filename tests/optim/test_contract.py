"""What a wrapped optimizer owes to PyTorch, on every optimizer it may wrap."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

import fastdg

Make = Callable[[Any], Optimizer]
BASES: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.1),
    "adam": lambda p: Adam(p, lr=1e-2),
    "fused_adamw": lambda p: AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=1e-2, momentum=0.5),
    "adagrad": lambda p: Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "radam": lambda p: RAdam(p, lr=1e-2),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=BASES)
def make(request: pytest.FixtureRequest) -> Make:
    return BASES[request.param]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def wrap(base: Optimizer, **settings: Any) -> fastdg.Fishr:
    return fastdg.Fishr(base, **{"penalty_weight": 5.0, "anneal_steps": 2, **settings})


def batch(model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Losses and domains of a forward on data that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 4, generator=generator).to(next(model.parameters()).dtype)
    y = torch.randint(3, (9,), generator=generator)
    domains = torch.randint(3, (9,), generator=generator)
    return F.cross_entropy(model(x), y, reduction="none"), domains


def steps(model: nn.Module, opt: fastdg.Fishr, seeds: Iterable[int]) -> None:
    for seed in seeds:
        opt.zero_grad()
        opt.backward(*batch(model, seed))
        opt.step()


def trained(make: Make, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = network(dtype)
    opt = wrap(make(model.parameters()), **settings)
    steps(model, opt, range(4))
    return model, opt


def same(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def shared(opt: fastdg.Fishr) -> None:
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    assert opt.defaults is opt.base.defaults


def emas(opt: fastdg.Fishr) -> list[Tensor]:
    state = opt.state_dict()["state"]
    return [state[i]["fishr_ema"] for i in sorted(state) if "fishr_ema" in state[i]]


def test_is_an_optimizer_and_shares_everything_with_the_one_inside(make: Make) -> None:
    model, opt = trained(make)
    assert isinstance(opt, Optimizer)
    shared(opt)
    opt.load_state_dict(opt.state_dict())
    shared(opt)
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    shared(opt)
    assert opt.base.param_groups[1]["lr"] == 0.5
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
def test_schedulers(make: Make, schedule: Callable[[Optimizer], Any], when: str) -> None:
    """Made for the wrapper or, before it, for the optimizer inside: the same rates, no warning."""
    model, plain = network(), network()
    reference = make(plain.parameters())
    expected = schedule(reference)
    base = make(model.parameters())
    early = schedule(base) if when == "before" else None
    opt = wrap(base)
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


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_continue_alike_and_leave_the_original(
    make: Make, through: str, scheduled: bool
) -> None:
    model, opt = trained(make)
    if scheduled:  # patches step on the instance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # made after training: torch asks about the order
            LambdaLR(opt, lambda epoch: 1.0)
    if through == "deepcopy":
        model2, opt2 = copy.deepcopy((model, opt))
    else:
        model2, opt2 = pickle.loads(pickle.dumps((model, opt)))
    before = copy.deepcopy(model)
    steps(model2, opt2, [7, 8])
    same(model, before)
    assert opt.steps == 4 and opt2.steps == 6
    steps(model, opt, [7, 8])
    same(model, model2)
    assert [p.data_ptr() for p in opt2.param_groups[0]["params"]] == [
        p.data_ptr() for p in model2.parameters()
    ]


def test_a_copy_made_between_backward_and_step_has_nothing_staged(make: Make) -> None:
    model, opt = trained(make)
    opt.backward(*batch(model))
    with pytest.raises(RuntimeError, match="needs a backward"):
        copy.deepcopy(opt).step()
    opt.step()


def test_names_survive_copies() -> None:
    model = network()
    opt = wrap(Adam(model.parameters()), model=model, params=["2.weight"])
    model2, opt2 = copy.deepcopy((model, opt))
    steps(model2, opt2, range(2))
    assert "'2.weight'" in repr(opt2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("params", ["head", "all"])
def test_state_dict_resumes_bit_for_bit(make: Make, params: str, dtype: torch.dtype) -> None:
    model, opt = trained(make, dtype, params=params)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(dtype)
    again.load_state_dict(saved["model"])
    resumed = wrap(make(again.parameters()), params=params)
    resumed.load_state_dict(state_dict=saved["opt"])
    assert resumed.steps == 4
    assert all(ema.dtype == torch.float32 for ema in emas(resumed))
    assert len(emas(resumed)) == (4 if params == "all" else 2)
    for seed in (7, 8):
        steps(model, opt, [seed])
        steps(again, resumed, [seed])
        same(model, again)
        for ema, expected in zip(emas(resumed), emas(opt), strict=True):
            assert torch.equal(ema, expected)


def test_state_dict_has_only_what_checkpoint_libraries_keep(make: Make) -> None:
    _, opt = trained(make)
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert set(state["state"]) <= {0, 1, 2, 3}
    assert state["param_groups"][0]["fishr_steps"] == 4
    assert len(emas(opt)) == 2


def test_a_state_saved_right_after_loading_is_whole(make: Make) -> None:
    model, opt = trained(make)
    saved = copy.deepcopy(opt.state_dict())
    resumed = wrap(make(copy.deepcopy(model).parameters()))
    resumed.load_state_dict(saved)
    again = resumed.state_dict()
    assert again["param_groups"] == saved["param_groups"]
    for i, entry in saved["state"].items():
        assert entry.keys() == again["state"][i].keys()


def test_loading_takes_a_copy(make: Make) -> None:
    model, opt = trained(make)
    state = opt.state_dict()
    twin = wrap(make(copy.deepcopy(model).parameters()))
    twin.load_state_dict(state)
    before = [ema.clone() for ema in emas(twin)]
    steps(model, opt, [9])
    assert all(torch.equal(a, b) for a, b in zip(before, emas(twin), strict=True))


def test_state_of_the_bare_optimizer_loads(make: Make) -> None:
    plain = network()
    base = make(plain.parameters())
    batch(plain)[0].mean().backward()
    base.step()
    model = copy.deepcopy(plain)
    opt = wrap(make(model.parameters()))
    opt.load_state_dict(copy.deepcopy(base.state_dict()))
    assert opt.steps == 0 and not emas(opt)
    steps(model, opt, range(3))
    assert opt.steps == 3
    # and the other way: the bare optimizer takes the wrapper's
    make(plain.parameters()).load_state_dict(opt.state_dict())


def test_a_state_without_its_history_is_refused(make: Make) -> None:
    _, opt = trained(make)
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        entry.pop("fishr_ema", None)
    fresh = network()
    other = wrap(make(fresh.parameters()))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"4 steps but has no fishr_ema"):
        other.load_state_dict(state)
    assert str(other.state_dict()) == str(before)
    wrap(make(fresh.parameters()), ema=None).load_state_dict(state)


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_state_dict(make: Make, flatten: bool) -> None:
    """Names in place of ids, a probing step, keyword loading; in one process."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, opt = trained(make)
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    assert "2.weight" in str(saved.keys() if flatten else saved["state"].keys())

    again = network()
    resumed = wrap(make(again.parameters()))
    if flatten:  # takes only what the optimizer has already: refused before it has
        with pytest.raises(ValueError, match="run one backward and step before loading"):
            dcp.set_optimizer_state_dict(again, resumed, saved, options=options)
        steps(again, resumed, [0])
    again.load_state_dict(weights)
    resumed.zero_grad()
    dcp.set_optimizer_state_dict(again, resumed, saved, options=options)
    assert resumed.steps == 4
    steps(model, opt, [7])
    steps(again, resumed, [7])
    same(model, again)


def test_a_probing_step_is_the_bare_optimizer_s(make: Make) -> None:
    model = network()
    opt = wrap(make(model.parameters()))
    before = copy.deepcopy(model)
    rates = [group["lr"] for group in opt.param_groups]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure=None)
    opt.param_groups[0]["lr"] = rates[0]
    same(model, before)
    assert opt.steps == 0 and not emas(opt)
    steps(model, opt, range(2))


def test_step_without_backward(make: Make) -> None:
    model = network()
    opt = wrap(make(model.parameters()))
    batch(model)[0].mean().backward()
    with pytest.raises(RuntimeError, match=r"opt.backward\(losses, domains\) in place of"):
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
    assert hasattr(opt.base, "_step_supports_amp_scaling")
    assert not hasattr(opt, "_step_supports_amp_scaling")


def test_closure(make: Make) -> None:
    model, opt = trained(make)
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
    with pytest.raises(TypeError, match=r"return \(losses, domains\)"):
        opt.step(lambda: batch(model)[0].mean())


def test_hooks_fire_once(make: Make) -> None:
    model, opt = trained(make)
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
    assert "step" not in vars(fastdg.Fishr) or fastdg.Fishr.step.hooked


def test_add_param_group(make: Make) -> None:
    """New layers are found in the next forward, and trained by both terms."""
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


def test_add_param_group_behind_the_wrapper_is_noticed() -> None:
    body, head = nn.Linear(4, 5), nn.Linear(5, 3)
    opt = wrap(Adam(body.parameters()))
    model = nn.Sequential(body, head)
    opt.base.add_param_group({"params": head.parameters()})
    with pytest.raises(RuntimeError, match="run the model again"):
        opt.backward(*batch(model))
    steps(model, opt, range(2))
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


def test_zero_grad(make: Make) -> None:
    model, opt = trained(make)
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


def test_repr(make: Make) -> None:
    opt = wrap(make(network().parameters()), num_domains=3)
    text = repr(opt)
    for part in ("Fishr(params='head'", "num_domains=3", "ema=0.95", type(opt.base).__name__):
        assert part in text
    assert "fishr_steps: 0" in text


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    torch._dynamo.reset()
    yield lambda: int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_compiled_step(name: str, graphs: Callable[[], int]) -> None:
    """Equal to the eager one, and no new graph once it has settled."""
    model, opt = trained(BASES[name])
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
