"""Checkpoints of every wrapper through torch.distributed.checkpoint and safetensors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import BASES
from runs import RUNS, Adversarial, Run
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.utils import _pytree as pytree

import fastdg

LABELLED = [name for name in RUNS if "ADIOS" not in name]


def go(run: Any, steps: int) -> Any:
    for _ in range(steps):
        run.step()
    return run


def ends_alike(run: Any, resumed: Any) -> None:
    for one in (run, resumed):
        torch.manual_seed(3)
        go(one, 4)
    found, expected = resumed.result(), run.result()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def whole(run: Run) -> nn.Module:
    """A module that owns every parameter of the optimizer."""
    terms, opt = [], run.opt
    while isinstance(opt, fastdg.DomainOptimizer):
        terms += opt.modules() if isinstance(opt, fastdg.MIRO) else []
        opt = opt.base
    return nn.ModuleDict({"model": run.model, "terms": nn.ModuleList(terms)})


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled, unavailable or uninit")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.product
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("name", LABELLED)
def test_from_disk_into_a_fresh_process(name: str, flatten: bool, tmp_path: Path) -> None:
    """Before any step. MIRO's variances have a size after one forward; how many averages wait in
    SWAD is not known before, so its checkpoint is read as a whole."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    run, fresh = go(RUNS[name](), 10), RUNS[name]()
    weights, state = get_state_dict(whole(run), run.opt, options=options)
    dcp.save({"weights": weights, "opt": state}, checkpoint_id=tmp_path)
    if "MIRO" in name:
        fresh.model(fresh.x)
    module = whole(fresh)
    if "SWAD" in name:
        dcp_to_torch_save(tmp_path, tmp_path / "whole.pt")
        saved = torch.load(tmp_path / "whole.pt", weights_only=True)
    else:
        weights, state = get_state_dict(module, fresh.opt, options=options)
        saved = {"weights": weights, "opt": state}
        dcp.load(saved, checkpoint_id=tmp_path)
    set_state_dict(
        module,
        fresh.opt,
        model_state_dict=saved["weights"],
        optim_state_dict=saved["opt"],
        options=options,
    )
    fresh.scheduler.load_state_dict(run.scheduler.state_dict())
    fresh.steps = run.steps
    ends_alike(run, fresh)


@pytest.mark.product
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["Fishr", "Fish", "GroupDRO", "AgrSum"])
def test_by_name_into_a_fresh_process(name: str, base: str, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    run, fresh = go(RUNS[name](base=BASES[base]), 10), RUNS[name](base=BASES[base])
    saved = copy.deepcopy(get_optimizer_state_dict(run.model, run.opt, options=options))
    set_optimizer_state_dict(fresh.model, fresh.opt, saved, options=options)
    fresh.model.load_state_dict(run.model.state_dict())
    fresh.scheduler.load_state_dict(run.scheduler.state_dict())
    fresh.steps = run.steps
    ends_alike(run, fresh)


def test_what_was_made_for_loading_changes_no_run() -> None:
    """A checkpoint is asked for, and none is loaded; other optimizers count torch's step."""
    for name in ("Fishr", "Fishr, all layers", "Fish", "GroupDRO", "SWAD(Fishr)"):
        plain, asked = (RUNS[name](base=BASES["sgd"]) for _ in range(2))
        get_optimizer_state_dict(asked.model, asked.opt)
        for run in (plain, asked):
            torch.manual_seed(0)
            go(run, 6)
        ends_alike(plain, asked)


def test_the_head_is_guessed_until_it_is_seen() -> None:
    body, head = nn.Linear(4, 5), nn.Linear(5, 3)
    model, other = nn.ModuleList([head, body]), nn.ModuleList([head, body])
    opt = fastdg.Fishr(torch.optim.Adam(model.parameters()), num_domains=2)
    get_optimizer_state_dict(other, opt)
    assert [p for p in opt.state if "fishr_ema" in opt.state[p]] == [body.weight, body.bias]
    losses = head(body(torch.randn(6, 4))).square().sum(1)
    opt.backward(losses, torch.arange(6) % 2)
    opt.step()
    assert [p for p in opt.state if "fishr_ema" in opt.state[p]] == [head.weight, head.bias]


@pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled, unavailable or uninit")
def test_adios_in_parts(tmp_path: Path) -> None:
    """Its optimizers by name: into plain ones that have not stepped nothing else would load."""
    run, fresh = go(RUNS["ADIOS"](), 5), RUNS["ADIOS"]()

    def state(run: Adversarial) -> dict[str, Any]:
        adios = run.opt
        encoder = get_state_dict(adios.objective, adios.encoder_optimizer)
        return {"encoder": encoder, "masker": get_state_dict(adios.masker, adios.masker_optimizer)}

    saved = {**state(run), "steps": run.opt.steps}
    dcp.save(saved, checkpoint_id=tmp_path)
    found = {**state(fresh), "steps": 0}
    dcp.load(found, checkpoint_id=tmp_path)
    for key, module, optimizer in (
        ("encoder", fresh.opt.objective, fresh.opt.encoder_optimizer),
        ("masker", fresh.opt.masker, fresh.opt.masker_optimizer),
    ):
        weights, steps = found[key]
        set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=steps)
    fresh.opt.steps = found["steps"]
    ends_alike(run, fresh)


@pytest.mark.parametrize("name", RUNS)
def test_safetensors(name: str, tmp_path: Path) -> None:
    """Every tensor of a state lies by itself, and all else is JSON."""
    run = go(RUNS[name](), 10)
    leaves, tree = pytree.tree_flatten_with_path(run.state())
    tensors = {pytree.keystr(path): x for path, x in leaves if isinstance(x, Tensor)}
    rest = json.dumps([None if isinstance(x, Tensor) else x for _, x in leaves])
    assert all(x.is_contiguous() for x in tensors.values())
    memory = [x.untyped_storage().data_ptr() for x in tensors.values() if x.numel()]
    assert len(set(memory)) == len(memory)
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "run", {"rest": rest, "tree": pytree.treespec_dumps(tree)})
    with safetensors.safe_open(tmp_path / "run", "pt") as file:
        found = json.loads(file.metadata()["rest"])
        keys = [pytree.keystr(path) for path, _ in leaves]
        stored = set(file.keys())
        values = [
            file.get_tensor(key) if key in stored else x for key, x in zip(keys, found, strict=True)
        ]
        state = pytree.tree_unflatten(values, pytree.treespec_loads(file.metadata()["tree"]))
    resumed = RUNS[name]()
    resumed.load(state)
    ends_alike(run, resumed)


@pytest.mark.parametrize("name", ["VREx", "Fish", "SWAD(PCGrad(MIRO))"])
def test_another_algorithm_s_state_is_refused(name: str) -> None:
    saved, run = go(RUNS["Fishr"](), 3).opt.state_dict(), RUNS[name]()
    before = copy.deepcopy(run.opt.state_dict())
    algorithm = type(run.opt.base if isinstance(run.opt, fastdg.SWAD) else run.opt).__name__
    with pytest.raises(ValueError, match=f"Fishr saved it, so {algorithm} .*of the Adam"):
        run.opt.load_state_dict(saved)
    assert str(run.opt.state_dict()) == str(before)


def test_the_optimizer_s_part_of_another_algorithm_s_state() -> None:
    run = go(RUNS["Fishr"](), 3)
    model = copy.deepcopy(run.model)
    adam = torch.optim.Adam(model.named_parameters())
    adam.load_state_dict(run.opt.state_dict())
    opt = fastdg.VREx(adam)
    assert opt.steps == 0 and opt.state[model.head.bias]["step"] == 3


def test_what_wrappers_that_are_gone_have_left_is_left_out() -> None:
    run, fresh = go(RUNS["SWAD(Fishr)"](), 9), RUNS["Fishr"]()
    with pytest.warns(UserWarning, match=r"^state_dict: .*SWAD") as caught:
        fresh.opt.load_state_dict(run.opt.state_dict())
    assert [w.filename for w in caught] == [__file__]
    assert fresh.opt.steps == 9
    assert "swad" not in str(fresh.opt.state_dict())
    assert "fishr_ema" in str(fresh.opt.state_dict())


@pytest.mark.parametrize("depth", range(3))
def test_a_state_loaded_anywhere_in_a_chain_reaches_all_of_it(depth: int) -> None:
    run, fresh = go(RUNS["Fishr(MIRO(RISE))"](), 9), RUNS["Fishr(MIRO(RISE))"]()
    state, inner = copy.deepcopy(run.state()), fresh.opt
    for _ in range(depth + 1):
        inner = inner.base
    inner.load_state_dict(state.pop("opt"))
    fresh.model.load_state_dict(state["model"])
    fresh.scheduler.load_state_dict(state["scheduler"])
    fresh.steps = run.steps
    assert fresh.opt.steps == fresh.opt.base.steps == 9
    ends_alike(run, fresh)
