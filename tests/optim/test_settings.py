"""The wrapper's settings in ``param_groups``: saved, loaded and scheduled as lr is."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from bases import WRAPS, Case, Make, batch, emas, network, same, steps, trained, wrap
from torch import nn
from torch.optim import Adam

import fastdg

OTHERS: dict[str, Any] = {
    "penalty_weight": 7.0,
    "anneal_steps": 3,
    "ema": 0.5,
    "reduction": "sum",
    "pre_anneal_weight": 0.25,
    "reset_base": False,
}


def held(opt: fastdg.Fishr) -> dict[str, Any]:
    return {name: getattr(opt, name) for name in OTHERS}


def test_they_are_in_the_first_group(make: Make) -> None:
    opt = wrap(make(network().parameters()), **OTHERS)
    group = opt.param_groups[0]
    assert held(opt) == {name: group[f"fishr_{name}"] for name in OTHERS} == OTHERS
    assert "fishr_penalty_weight: 7.0" in repr(opt.base)
    assert set(opt.defaults) == set(make(network().parameters()).defaults)
    group["fishr_penalty_weight"] = 2.0
    assert opt.penalty_weight == 2.0
    opt.penalty_weight = 3.0
    assert group["fishr_penalty_weight"] == 3.0
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert not any(key.startswith("fishr") for key in opt.param_groups[1])


@pytest.mark.parametrize("through", ["state_dict", "inside", "pickle", "deepcopy"])
def test_they_come_back(make: Make, through: str) -> None:
    model, opt = trained(make, **OTHERS)
    opt.penalty_weight = 9.0
    if through == "pickle":
        again = pickle.loads(pickle.dumps(opt))
    elif through == "deepcopy":
        again = copy.deepcopy(opt)
    else:
        again = wrap(make(copy.deepcopy(model).parameters()))
        (again if through == "state_dict" else again.base).load_state_dict(opt.state_dict())
    assert held(again) == {**OTHERS, "penalty_weight": 9.0}
    assert again.steps == 4


@pytest.mark.parametrize("through", ["state_dict", "inside", "pickle", "deepcopy"])
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("AgrSum", {"reduction": "sum"}),
        ("AgrRand", {"reduction": "sum"}),
        ("PCGrad", {"reduction": "sum", "shared_order": True}),
        ("ANDMask", {"threshold": 0.25}),
        ("SANDMask", {"threshold": 0.25, "steepness": 0.5}),
    ],
)
def test_those_of_other_wrappers_come_back(name: str, others: dict[str, Any], through: str) -> None:
    _, opt = Case(name, "adam").trained(**others)
    if through == "pickle":
        again = pickle.loads(pickle.dumps(opt))
    elif through == "deepcopy":
        again = copy.deepcopy(opt)
    else:
        again = WRAPS[name](Adam(network().parameters()))
        (again if through == "state_dict" else again.base).load_state_dict(opt.state_dict())
    assert again.settings() == {**others, "num_domains": None}
    assert again.steps == 4
    assert {f"{opt.prefix}_{key}" for key in others} <= set(opt.param_groups[0])


def test_the_weight_can_be_scheduled() -> None:
    model = network()
    opt = wrap(Adam(model.parameters()), anneal_steps=0)
    for weight in (1.0, 4.0):
        opt.param_groups[0]["fishr_penalty_weight"] = weight
        opt.zero_grad()
        opt.backward(*batch(model))
        s = opt.statistics
        torch.testing.assert_close(s["objective"], s["loss"] + weight * s["penalty"])
        opt.step()


@pytest.mark.parametrize("inside", [False, True])
def test_a_state_of_the_bare_optimizer_leaves_them(make: Make, inside: bool) -> None:
    model = network()
    state = copy.deepcopy(make(model.parameters()).state_dict())
    opt = wrap(make(model.parameters()), **OTHERS)
    steps(model, opt, range(2))
    (opt.base if inside else opt).load_state_dict(state)
    assert held(opt) == OTHERS
    assert opt.steps == 0 and not emas(opt)
    steps(model, opt, range(2))
    assert opt.steps == 2


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_loaded_into_the_inner_optimizer(
    make: Make, dtype: torch.dtype, copied: bool
) -> None:
    """It reaches the wrapper: bit for bit what loading into the wrapper gives."""
    model, opt = trained(make, dtype)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    if copied:
        model, opt = copy.deepcopy((model, opt))
    steps(model, opt, [8])
    model.load_state_dict(saved[0])
    opt.base.load_state_dict(copy.deepcopy(saved[1]))  # torch does not copy what it loads
    twin = network(dtype)
    twin.load_state_dict(saved[0])
    other = wrap(make(twin.parameters()))
    other.load_state_dict(saved[1])
    assert opt.steps == other.steps == 4
    for seed in (7, 9):
        for ema, expected in zip(emas(opt), emas(other), strict=True):
            assert ema.dtype == torch.float32 and torch.equal(ema, expected)
        steps(model, opt, [seed])
        steps(twin, other, [seed])
        same(model, twin)
    for p in model.parameters():
        if "fishr_ema" in opt.state[p]:
            assert opt.state[p]["fishr_ema"] is opt._own_state["ema"][p]


class Own(Adam):
    """Loads in a way of its own, without torch's hooks."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        twin = Adam(self.param_groups[0]["params"])
        twin.load_state_dict(state_dict)
        self.__setstate__({"state": twin.state, "param_groups": twin.param_groups})


def test_an_inner_optimizer_that_loads_in_its_own_way() -> None:
    model, opt = trained(Own, torch.bfloat16, **OTHERS)
    again = wrap(Own(copy.deepcopy(model).parameters()))
    again.load_state_dict(opt.state_dict())
    assert held(again) == OTHERS and again.steps == 4
    for ema, expected in zip(emas(again), emas(opt), strict=True):
        assert torch.equal(ema, expected)


def test_a_state_without_counters_put_in_by_hand() -> None:
    model = network()
    opt = wrap(Adam(model.parameters()), **OTHERS)
    bare = Adam(model.parameters())
    opt.param_groups = bare.param_groups
    assert held(opt) == OTHERS and opt.steps == 0
    steps(model, opt, range(1))
    assert opt.steps == 1


def test_wrapped_again(make: Make) -> None:
    """The history goes on, under the new settings; the old wrapper is let go of."""
    model, opt = trained(make)
    twin, reference = copy.deepcopy((model, opt))
    reference.penalty_weight = 9.0
    again = wrap(opt.base, penalty_weight=9.0)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None and len(again.base._optimizer_load_state_dict_pre_hooks) == 1
    assert again.steps == 4 and again.penalty_weight == 9.0
    steps(model, again, [5])
    steps(twin, reference, [5])
    same(model, twin)


def test_wrappers_die_without_the_garbage_collector() -> None:
    opt = wrap(Adam(network().parameters()))
    gone = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("penalty_weight", float("inf"), "^penalty_weight: .*got inf"),
        ("penalty_weight", -1.0, "^penalty_weight: .*got -1.0"),
        ("pre_anneal_weight", float("nan"), "^pre_anneal_weight: .*got nan"),
        ("pre_anneal_weight", "1", "^pre_anneal_weight: .*got '1'"),
        ("anneal_steps", True, "^anneal_steps: .*got True"),
        ("anneal_steps", 1.5, "^anneal_steps: .*got 1.5"),
        ("ema", 1.0, "^ema: .*got 1.0"),
        ("ema", "0.9", "^ema: .*got '0.9'"),
        ("reduction", "none", "^reduction: .*got 'none'"),
        ("reset_base", "no", "^reset_base: .*got 'no'"),
    ],
)
def test_bad_values(name: str, value: Any, message: str) -> None:
    base = Adam(network().parameters())
    with pytest.raises(ValueError, match=message):
        wrap(base, **{name: value})
    assert not any(key.startswith("fishr") for key in base.param_groups[0])
    opt = wrap(base)
    before = held(opt)
    with pytest.raises(ValueError, match=message):
        setattr(opt, name, value)
    assert held(opt) == before
