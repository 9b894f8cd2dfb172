"""The demo: its plan, its runs against plain torch, resuming, and what is said of the numbers."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdg import Fishr
from fastdg.studies.data.digits import TASKS
from fastdg.studies.experiments import demo, pretraining, training
from fastdg.studies.experiments.demo import Plan
from fastdg.studies.experiments.settings import ALGORITHMS, DEFAULT, GENIE_LR, SETTINGS

SMALL = Plan(("erm", "fishr", "pcgrad"), ("coloured",), seeds=1, steps=4)
MEASURED = ("step_seconds", "peak_bytes")


def same(run: dict[str, Any]) -> dict[str, Any]:
    """What of a run does not depend on the machine."""
    return {key: value for key, value in run.items() if key not in MEASURED}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithms": ("mixup",)}, "^algorithms: .*got mixup"),
        ({"algorithms": ()}, "^algorithms: .*got none"),
        ({"tasks": ("mnist",)}, "^datasets: .*got mnist"),
        ({"seeds": 0}, "^seeds: .*got 0"),
        ({"steps": 2}, "^steps: .*got 2"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Plan(**changes)


def test_units_are_every_combination_once_with_algorithms_in_turn() -> None:
    units = list(Plan(seeds=2).units())
    assert len({key for key, *_ in units}) == len(units) == 2 * len(DEFAULT) * (1 + 6)
    assert units[0] == ("coloured/2/0/erm", "coloured", 2, 0, "erm")
    assert tuple(unit[-1] for unit in units[: len(DEFAULT)]) == DEFAULT
    assert {unit[2] for unit in units if unit[1] == "rotated"} == set(range(6))


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 2])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, at: int) -> None:
    whole = demo.run(SMALL, tmp_path / "whole.json")

    def kill(key: str, done: int, total: int) -> None:
        if done == at:
            raise Killed

    path = tmp_path / "killed.json"
    with pytest.raises(Killed):
        demo.run(SMALL, path, progress=kill)
    kept = json.loads(path.read_text())["runs"]
    assert len(kept) == at
    resumed = demo.run(SMALL, path)
    assert resumed["runs"].keys() == whole["runs"].keys()
    for key, run in resumed["runs"].items():
        assert same(run) == same(whole["runs"][key])
        assert key not in kept or run == kept[key]  # times too: it was not run again
    assert sorted(file.name for file in tmp_path.iterdir()) == ["killed.json", "whole.json"]


def test_workers_come_to_the_same_numbers(tmp_path: Path) -> None:
    alone = demo.run(SMALL, tmp_path / "alone.json")["runs"]
    several = demo.run(SMALL, tmp_path / "several.json", workers=2)["runs"]
    assert several.keys() == alone.keys()
    assert all(same(run) == same(alone[key]) for key, run in several.items())


def test_a_killed_worker_is_said(tmp_path: Path) -> None:
    others = multiprocessing.active_children()  # the ranks of tests/distributed

    def kill(key: str, done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()

    with pytest.raises(ChildProcessError, match="--workers 1"):
        demo.run(SMALL, tmp_path / "results.json", progress=kill, workers=2)


def test_the_file_says_what_was_run_where_and_to_what_end(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    threads = torch.get_num_threads()
    path = tmp_path / "results.json"
    results = demo.run(SMALL, path, progress=lambda *now: told.append(now))
    assert torch.get_num_threads() == threads
    written = json.loads(path.read_text())
    assert set(written) == {"settings", "machine", "data", "runs", "sha256"}
    assert written["machine"]["threads"] == 1
    assert written["settings"]["rotated"] == SETTINGS["rotated"].identity(4)
    assert [now[1:] for now in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for key, *_ in SMALL.units():
        run = written["runs"][key]
        assert run == results["runs"][key]
        assert set(run) == {"chosen", "last", "chosen_step", "curve", *MEASURED}
        assert run["step_seconds"] > 0 and run["peak_bytes"] > 0
        assert [point["step"] for point in run["curve"]] == [1, 2, 3, 4]
        assert set(run["curve"][0]) == {
            "step",
            "loss",
            "validation",
            "test",
            "variance",
            "distance",
            "cosine",
        }


def test_more_is_added_and_only_what_was_asked_for_is_given(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = demo.run(replace(SMALL, algorithms=("erm",)), path)
    both = demo.run(replace(SMALL, algorithms=("fishr", "erm")), path)
    assert both["runs"]["coloured/2/0/erm"] == first["runs"]["coloured/2/0/erm"]
    again = demo.run(replace(SMALL, algorithms=("erm",)), path)
    assert set(again["runs"]) == {"coloured/2/0/erm"}
    assert len(json.loads(path.read_text())["runs"]) == 2
    demo.run(replace(SMALL, algorithms=("erm",)), path, fresh=True)
    assert len(json.loads(path.read_text())["runs"]) == 1


def test_other_settings_and_other_files_are_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    only = replace(SMALL, algorithms=("erm",))
    demo.run(only, path)
    before = path.read_bytes()
    words = r"coloured\.steps was 4, now 5; rotated\.steps was 4, now 5"
    with pytest.raises(ValueError, match=words):
        demo.run(replace(only, steps=5), path)
    assert path.read_bytes() == before
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a result file"):
        demo.run(only, path)


def plainly(name: str, left_out: int, seed: int, steps: int) -> tuple[nn.Module, list[float]]:
    """ERM in plain torch on the same draws: the model, and the loss of every step."""
    task, setting = TASKS[name](seed), SETTINGS[name]
    generator = torch.Generator().manual_seed(1000 * seed + left_out)
    fit, _ = training.split(task, [d for d in range(len(task.domains)) if d != left_out], generator)
    torch.manual_seed(seed)
    model = setting.network(task.images[0].shape[1], task.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr)
    losses = []
    for _ in range(steps):
        xs, ys = [], []
        for x, y in fit:
            take = slice(None)
            if setting.batch is not None:
                take = torch.randint(len(y), (setting.batch,), generator=generator)
            xs.append(x[take])
            ys.append(y[take])
        loss = F.cross_entropy(model(torch.cat(xs)), torch.cat(ys))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize(("name", "left_out"), [("coloured", 2), ("rotated", 4)])
def test_erm_is_plain_training_on_the_batches_of_the_others(name: str, left_out: int) -> None:
    task = TASKS[name](1)
    model, losses = plainly(name, left_out, 1, 5)
    run = training.train(task, SETTINGS[name], "erm", left_out, 1, 5)
    assert [point["loss"] for point in run["curve"]] == pytest.approx(losses, rel=1e-5)
    with torch.no_grad():
        right = (model(task.images[left_out]).argmax(1) == task.labels[left_out]).float().mean()
    assert run["last"] == pytest.approx(100 * float(right), abs=0.5)
    # Without a weight, Fishr takes the same steps from the same start.
    none = {"penalty_weight": 0.0, "pre_anneal_weight": 0.0, "reset_base": False}
    setting = replace(SETTINGS[name], given={Fishr: none})
    fishr = training.train(task, setting, "fishr", left_out, 1, 5)
    assert [point["loss"] for point in fishr["curve"]] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_settings_give_the_optimizer_they_name(algorithm: str, task: str) -> None:
    setting, chosen = SETTINGS[task], ALGORITHMS[algorithm]
    opt = setting.optimizer(algorithm, setting.network(1, 10), range(5), 200, 0)
    assert type(opt) is (chosen.wrapper or torch.optim.Adam)
    assert opt.param_groups[0]["lr"] == (GENIE_LR if algorithm == "genie" else setting.lr)
    if chosen.wrapper is None:
        return
    assert opt.num_domains == (None if algorithm in ("swad", "sma") else 5)
    wanted = {**chosen.given, **setting.given.get(chosen.wrapper, {})}
    assert {name: getattr(opt, name) for name in wanted} == wanted
    if chosen.wrapper in setting.given:
        assert opt.anneal_steps == setting.anneal_steps(200)
        assert setting.divisor(opt) == 1


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "erm"])
def test_every_algorithm_trains(algorithm: str) -> None:
    task, steps = TASKS["rotated"](0), 4
    run = training.train(task, SETTINGS["rotated"], algorithm, 1, 0, steps)
    if algorithm in ("agr-rand", "pcgrad"):  # which draw numbers
        again = training.train(task, SETTINGS["rotated"], algorithm, 1, 0, steps)
        assert same(run) == same(again)
    losses = [point["loss"] for point in run["curve"]]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_a_backbone_is_pretrained_on_the_images_given() -> None:
    """All but the last layer, the same way each time."""
    task, setting = TASKS["rotated"](0), SETTINGS["rotated"]
    torch.manual_seed(0)
    model = setting.network(1, 10)
    other, fresh = copy.deepcopy(model), copy.deepcopy(model)
    for network in (model, other):
        pretraining.pretrain(network, task.images[:2], 3)
    for one, two, before in zip(*(m.parameters() for m in (model, other, fresh)), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, before) == (before.shape[0] == 10)


def test_a_penalty_of_the_script_divides_the_gradient_after_the_anneal() -> None:
    setting = SETTINGS["coloured"]
    opt = setting.optimizer("vrex", setting.network(2, 2), range(2), 10, 0)
    opt.param_groups[0]["vrex_steps"] = setting.anneal_steps(10)
    assert setting.divisor(opt) == opt.penalty_weight == 91257.18613115903
    assert setting.divisor(setting.optimizer("pcgrad", setting.network(2, 2), range(2), 10, 0)) == 1


def test_the_first_best_mean_validation_chooses_and_the_domain_left_out_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = TASKS["coloured"](0)
    validation = iter([(60, 70), (80, 90), (90, 80), (10, 99)])  # means 65, 85, 85, 54.5
    test = iter([99.0, 1.0, 2.0, 100.0])
    pair: list[float] = []

    def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
        if x is task.images[2]:
            return next(test)
        if not pair:
            pair.extend(next(validation))
        return pair.pop()

    monkeypatch.setattr(training, "accuracy", accuracy)
    run = training.train(task, SETTINGS["coloured"], "erm", 2, 0, 4)
    assert [point["validation"] for point in run["curve"]] == [65, 85, 85, 54.5]
    assert (run["chosen_step"], run["chosen"], run["last"]) == (2, 1.0, 100.0)


def test_the_split_is_four_fifths_of_each_training_domain() -> None:
    task = TASKS["rotated"](0)
    fit, held = training.split(task, [0, 2], torch.Generator().manual_seed(0))
    for d, a, b in zip([0, 2], fit, held, strict=True):
        assert len(a[1]) == round(0.8 * len(task.labels[d]))
        both = torch.cat([a[0], b[0]]).flatten(1)
        everything = task.images[d].flatten(1)
        assert torch.equal(both.unique(dim=0), everything.unique(dim=0))


def test_copies_of_an_image_stay_together() -> None:
    task = TASKS["coloured"](0)
    (fit,), (held,) = training.split(task, [0], torch.Generator().manual_seed(0))
    assert len(fit[1]) + len(held[1]) == len(task.labels[0])

    def ink(part: training.Part) -> set[bytes]:
        """What is left of each image when it is moved, by the sums of its middle."""
        middle = part[0].sum(1)[: len(part[1]) // task.copies, 1:-1, 1:-1]
        return {image.numpy().tobytes() for image in middle}

    assert not ink(fit) & ink(held)


def test_cosines_are_those_of_the_domains_own_gradients() -> None:
    task, setting = TASKS["rotated"](0), SETTINGS["rotated"]
    model = setting.network(1, 10)
    parts = [(task.images[d][: 4 + d], task.labels[d][: 4 + d]) for d in range(3)]
    gradients = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            ]
        )
        for x, y in parts
    ]
    wanted = [
        float(F.cosine_similarity(gradients[a], gradients[b], dim=0))
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    assert training.cosines(model, parts) == pytest.approx(wanted, abs=1e-5)


def test_head_variances_are_those_of_per_sample_gradients() -> None:
    task, setting = TASKS["coloured"](0), SETTINGS["coloured"]
    model = setting.network(2, 2)
    parts = [(task.images[d][:6], task.labels[d][:6]) for d in (0, 1)]
    wanted = []
    for xs, ys in parts:
        grads = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        F.cross_entropy(model(x[None]), y[None]), list(model[-1].parameters())
                    )
                ]
            )
            for x, y in zip(xs, ys, strict=True)
        ]
        wanted.append(torch.stack(grads).var(0, correction=0))
    v = torch.stack(wanted)
    middle = v.mean(0)
    variance, distance = training.head_variances(model, parts)
    assert variance == pytest.approx(v.mean(1).tolist(), rel=1e-4)
    apart = ((v - middle) ** 2).sum(1).mean().sqrt() / middle.norm()
    assert distance == pytest.approx(float(apart), rel=1e-4)
