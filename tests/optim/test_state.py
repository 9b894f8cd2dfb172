"""Copies, checkpoints and resuming, on every optimizer a wrapper may wrap."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from bases import Case, Make, batch, emas, network, same, steps, trained, wrap
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

pytestmark = pytest.mark.product  # of wrappers, the optimizers inside and what a row adds
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_continue_alike_and_leave_the_original(
    case: Case, through: str, scheduled: bool
) -> None:
    model, opt = case.trained()
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


def test_a_copy_made_between_backward_and_step_has_nothing_staged(case: Case) -> None:
    model, opt = case.trained()
    opt.backward(*batch(model))
    with pytest.raises(RuntimeError, match="needs a backward"):
        copy.deepcopy(opt).step()
    opt.step()


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_names_survive_copies(through: str) -> None:
    model = network()
    opt = wrap(Adam(model.parameters()), model=model, params=["2.weight"])
    if through == "deepcopy":
        model2, opt2 = copy.deepcopy((model, opt))
    else:
        model2, opt2 = pickle.loads(pickle.dumps((model, opt)))
    steps(model2, opt2, range(2))
    assert "'2.weight'" in repr(opt2)
    opt2.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    steps(model2, opt2, range(2))
    assert list(opt2._names.values()) == [*dict(model.named_parameters()), "param_groups[1][0]"]


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


@pytest.mark.parametrize("through", ["file", "inside"])
def test_a_run_goes_on_bit_for_bit(case: Case, through: str) -> None:
    model, opt = case.trained()
    saved = {"model": model.state_dict(), "opt": opt.state_dict()}
    if through == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    else:
        saved = copy.deepcopy({**saved, "opt": opt.base.state_dict()})
    again = network()
    again.load_state_dict(saved["model"])
    resumed = case.wrap(case.make(again.parameters()))
    (resumed if through == "file" else resumed.base).load_state_dict(saved["opt"])
    assert resumed.steps == 4
    for seed in (7, 8):
        steps(model, opt, [seed])
        steps(again, resumed, [seed])
        same(model, again)
    assert str(opt.state_dict()) == str(resumed.state_dict())


def test_state_dict_has_only_what_checkpoint_libraries_keep(case: Case) -> None:
    _, opt = case.trained()
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert set(state["state"]) <= set(range(opt._size()))
    assert state["param_groups"][0][f"{opt.prefix}_steps"] == 4
    assert case.wrapper != "Fishr" or len(emas(opt)) == 2


def test_a_state_saved_right_after_loading_is_whole(case: Case) -> None:
    model, opt = case.trained()
    saved = copy.deepcopy(opt.state_dict())
    resumed = case.wrap(case.make(copy.deepcopy(model).parameters()))
    resumed.load_state_dict(saved)
    again = resumed.state_dict()
    assert str(again["param_groups"]) == str(saved["param_groups"])
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


def test_state_of_the_bare_optimizer_loads(case: Case) -> None:
    plain = network()
    base = case.make(plain.parameters())
    batch(plain)[0].mean().backward()
    base.step()
    model = copy.deepcopy(plain)
    opt = case.wrap(case.make(model.parameters()))
    opt.load_state_dict(copy.deepcopy(base.state_dict()))
    assert opt.steps == 0
    steps(model, opt, range(3))
    assert opt.steps == 3
    if "MIRO" in case.wrapper:  # which has one more group
        return
    # and the other way: the bare optimizer takes the wrapper's
    case.make(plain.parameters()).load_state_dict(opt.state_dict())


def test_a_state_without_its_history_is_refused(make: Make) -> None:
    _, opt = trained(make)
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        entry.pop("fishr_ema", None)
    fresh = network()
    other = wrap(make(fresh.parameters()))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"^state_dict: .*fishr_ema"):
        other.load_state_dict(state)
    assert str(other.state_dict()) == str(before)
    state["param_groups"][0]["fishr_ema"] = None
    other.load_state_dict(state)
    assert other.steps == 4 and other.ema is None
    steps(fresh, other, range(2))


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_state_dict(case: Case, flatten: bool) -> None:
    """Names in place of ids, a probing step, keyword loading; in one process."""
    from torch.distributed.checkpoint import state_dict as dcp

    if "MIRO" in case.wrapper:
        pytest.skip("asks for a module that owns all parameters: in test_miro.py")
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, opt = case.trained()
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, opt, options=options))
    assert "2.weight" in str(saved.keys() if flatten else saved["state"].keys())

    again = network()
    resumed = case.wrap(case.make(again.parameters()))
    if flatten and case.wrapper == "Fishr":  # takes only what is there already: refused before
        with pytest.raises(ValueError, match=r"^state_dict: .*backward"):
            dcp.set_optimizer_state_dict(again, resumed, saved, options=options)
    if flatten:
        steps(again, resumed, [0])
    again.load_state_dict(weights)
    resumed.zero_grad()
    dcp.set_optimizer_state_dict(again, resumed, saved, options=options)
    assert resumed.steps == 4
    steps(model, opt, [7])
    steps(again, resumed, [7])
    same(model, again)


def test_a_probing_step_is_the_bare_optimizer_s(case: Case) -> None:
    model = network()
    opt = case.wrap(case.make(model.parameters()))
    before = copy.deepcopy(model)
    rates = [group["lr"] for group in opt.param_groups]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in opt.param_groups:
        group["lr"] = 0.0
    if opt.state:  # Adagrad is born with its state, so that nobody probes it
        with pytest.raises(RuntimeError, match="needs a backward"):
            opt.step(closure=None)
        opt.zero_grad()
    else:
        opt.step(closure=None)
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    same(model, before)
    assert opt.steps == 0
    steps(model, opt, range(2))
