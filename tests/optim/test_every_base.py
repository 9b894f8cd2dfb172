"""A run is saved, resumed and copied bit for bit, whatever optimizer is inside."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from bases import Network, batch, miro, same, wrap
from every_base import BASES, ODD, WITH_MORE, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import fastdg
from fastdg.core.base_state import renew

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages in their own code

WRAPS = {
    "Fishr": lambda base, model: wrap(base, num_domains=3),
    "AgrSum": lambda base, model: fastdg.AgrSum(base),
    "SWAD(Fishr(MIRO))": lambda base, model: fastdg.SWAD(wrap(miro(base), num_domains=3), model),
}


def made(base: str, wrapper: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Network()
    opt = WRAPS[wrapper](BASES[base](model), model)
    train(opt)
    return model, opt


def steps(model: nn.Module, opt: Any, seeds: Iterable[int]) -> None:
    for seed in seeds:
        opt.zero_grad()
        opt.backward(*batch(model, seed))
        torch.manual_seed(seed)  # some draw random numbers
        opt.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def row(base: str, wrapper: str) -> Any:
    """Every optimizer inside Fishr, which keeps state in it; two inside each of the others."""
    always = wrapper == "Fishr" or base in ("timm Lookahead", "Adagrad")
    return pytest.param(base, wrapper, marks=[] if always else pytest.mark.matrix)


@pytest.mark.parametrize(
    ("base", "wrapper"),
    [
        row(base, wrapper)
        for base in BASES
        for wrapper in WRAPS
        if "(" not in wrapper or base in ODD
    ],
)
def test_a_saved_run_goes_on_bit_for_bit(base: str, wrapper: str) -> None:
    model, opt = made(base, wrapper)
    steps(model, opt, range(10))
    saved = through_a_file({"model": model.state_dict(), "opt": opt.state_dict()})
    again, resumed = made(base, wrapper)
    if base == "TRAC":  # refuses a state of other shapes, which MIRO's have before a forward
        batch(again)
    resumed.load_state_dict(saved["opt"])
    again.load_state_dict(saved["model"])
    train(resumed)
    assert resumed.steps == 10
    for one in ((model, opt), (again, resumed)):
        steps(*one, range(10, 20))
    same(model, again)
    assert str(opt.state_dict()["param_groups" if "state" in saved["opt"] else "fastdg"]) == str(
        resumed.state_dict()["param_groups" if "state" in saved["opt"] else "fastdg"]
    )


@pytest.mark.parametrize("base", BASES)
def test_inside_a_wrapper_it_is_the_bare_optimizer(base: str) -> None:
    """On the wrapper's gradients, through a checkpoint of each."""
    model, opt = made(base, "AgrSum")
    twin = copy.deepcopy(model)
    bare = BASES[base](twin)
    train(bare)

    def both(seeds: Iterable[int]) -> None:
        for seed in seeds:
            opt.zero_grad()
            opt.backward(*batch(model, seed))
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad.clone()
            for one in (opt, bare):
                torch.manual_seed(seed)
                one.step()

    both(range(8))
    same(model, twin)
    states = through_a_file([opt.state_dict(), bare.state_dict()])
    opt, bare = fastdg.AgrSum(BASES[base](model)), BASES[base](twin)
    train(opt), train(bare)
    opt.load_state_dict(states[0])
    bare.load_state_dict(states[1])
    both(range(8, 16))
    same(model, twin)
    opt.load_state_dict(states[1])  # the bare optimizer's
    assert opt.steps == 0
    BASES[base](twin).load_state_dict(states[0])  # and the other way


@pytest.mark.product
@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
@pytest.mark.parametrize("base", BASES)
def test_copies_go_on_alike(base: str, through: str) -> None:
    model, opt = made(base, "Fishr")
    steps(model, opt, range(6))
    if through == "deepcopy":
        model2, opt2 = copy.deepcopy((model, opt))
    else:
        model2, opt2 = pickle.loads(pickle.dumps((model, opt)))
    before = copy.deepcopy(model)
    steps(model2, opt2, range(6, 12))
    same(model, before)
    steps(model, opt, range(6, 12))
    same(model, model2)


@pytest.mark.parametrize("base", BASES)
def test_started_anew_it_is_a_new_one(base: str) -> None:
    model, opt = made(base, "AgrSum")
    steps(model, opt, range(5))
    renew(opt.base, ("agrsum_",))
    assert opt.steps == 5
    twin = copy.deepcopy(model)
    fresh = fastdg.AgrSum(BASES[base](twin))
    train(fresh)
    for one in ((model, opt), (twin, fresh)):
        steps(*one, range(5, 12))
    same(model, twin)


@pytest.mark.parametrize("base", BASES)
def test_distributed_checkpoints_are_whole_or_refused(base: str) -> None:
    model, opt = made(base, "Fishr")
    steps(model, opt, range(6))
    opt.zero_grad()  # torch makes a step if nothing says that there were some
    if base in WITH_MORE:
        with pytest.raises(RuntimeError, match=r"^state_dict: .*torch\.save"):
            get_optimizer_state_dict(model, opt)
        return
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    again, resumed = made(base, "Fishr")
    set_optimizer_state_dict(again, resumed, saved)
    again.load_state_dict(model.state_dict())
    train(resumed)
    for one in ((model, opt), (again, resumed)):
        steps(*one, range(6, 12))
    same(model, again)


def test_a_distributed_checkpoint_that_lost_the_state_is_refused() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, opt = made("timm Lookahead", "AgrSum")
    steps(model, opt, range(6))
    saved = get_optimizer_state_dict(model, opt, options=options)
    again, fresh = made("timm Lookahead", "AgrSum")
    with pytest.raises(ValueError, match=r"^state_dict: .*lacks"):
        set_optimizer_state_dict(again, fresh, saved, options=options)


def test_entries_that_the_optimizer_saves_beside_its_state_are_missed() -> None:
    model, opt = made("StableSPAM", "AgrSum")
    steps(model, opt, range(2))
    state = opt.state_dict()
    assert state.pop("total_step") == 2
    with pytest.warns(UserWarning, match=r"^state_dict: .*'total_step'.*StableSPAM"):
        opt.load_state_dict(state)
    model, opt = made("Lookahead", "AgrSum")
    steps(model, opt, range(2))
    state = opt.state_dict()
    del state["lookahead_state"]
    with pytest.raises(ValueError, match=r"^state_dict: .*'lookahead_state'.*Lookahead"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("base", ["timm Lookahead", "Lookahead"])
def test_a_state_loaded_into_an_optimizer_without_hooks_is_noticed(base: str) -> None:
    model, opt = made(base, "AgrSum")
    steps(model, opt, range(4))
    saved = copy.deepcopy(opt.base.state_dict())
    again, fresh = made(base, "AgrSum")
    again.load_state_dict(model.state_dict())
    fresh.base.load_state_dict(saved)
    for one in ((model, opt), (again, fresh)):
        steps(*one, range(4, 8))
    same(model, again)
    assert fresh.steps == 8
    other, fishr = made(base, "Fishr")
    steps(other, fishr, range(4))
    saved = copy.deepcopy(fishr.base.state_dict())
    fishr.base.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"^state_dict: .*fishr_ema"):
        steps(other, fishr, [4])


class Own(torch.optim.SGD):
    """Keeps all its state in a shape of its own."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr, momentum=0.9)
        self.calls = {"steps": 0}

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.calls["steps"] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"moments": [super().state_dict()], "calls": dict(self.calls)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["moments"][0])
        self.calls = dict(state_dict["calls"])


@pytest.mark.parametrize("wrapper", WRAPS)
def test_a_state_dict_of_any_layout(wrapper: str) -> None:
    def made() -> tuple[nn.Module, Any]:
        model = Network()
        return model, WRAPS[wrapper](Own(model.parameters()), model)

    model, opt = made()
    steps(model, opt, range(6))
    state = opt.state_dict()
    assert state.keys() == {"moments", "calls", "fastdg"}
    again, resumed = made()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(state))
    copied, copy_of = copy.deepcopy((model, opt))
    for one in ((model, opt), (again, resumed), (copied, copy_of)):
        steps(*one, range(6, 12))
    same(model, again)
    same(model, copied)
    assert opt.steps == resumed.steps == 12
    anew = 0 if wrapper == "AgrSum" else 2  # Fishr starts its optimizer anew at step 2
    assert opt.state_dict()["calls"] == resumed.state_dict()["calls"] == {"steps": 12 - anew}


def test_public_methods_are_those_of_the_optimizer_inside() -> None:
    model, opt = made("AdamWScheduleFree", "SWAD(Fishr(MIRO))")
    steps(model, opt, range(4))
    training = copy.deepcopy(model)
    opt.eval()
    assert not opt.param_groups[0]["train_mode"]
    assert not torch.equal(model[0].weight, training[0].weight)
    opt.train()
    torch.testing.assert_close(model[0].weight, training[0].weight)
    assert not hasattr(wrap(torch.optim.SGD(model.parameters())), "train")
    with pytest.raises(AttributeError, match="'Fishr' object has no attribute 'nothing'"):
        _ = opt.base.nothing


def test_lookahead_s_own_methods_and_not_its_optimizer() -> None:
    model, opt = made("Lookahead", "AgrSum")
    steps(model, opt, range(4))
    weights = copy.deepcopy(model)
    opt.backup_and_load_cache()
    assert not torch.equal(model[0].weight, weights[0].weight)
    opt.clear_and_load_backup()
    same(model, weights)
    assert isinstance(opt.base.optimizer, Optimizer)
    assert not hasattr(opt, "optimizer")  # frameworks would take it for what this one wraps


def test_what_cannot_be_made_anew_says_so() -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, lr: float, params: Any) -> None:
            super().__init__(params, lr=lr, momentum=0.9)

    model = Network()
    opt = wrap(Odd(0.1, model.parameters()))
    steps(model, opt, range(2))
    with pytest.warns(UserWarning, match=r"^reset_base: .*Odd"):
        steps(model, opt, [2])
