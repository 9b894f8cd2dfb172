"""The benchmark: what is trained on and chosen by, its settings, and that a killed run goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdg
from fastdg.studies.benchmark import folds, training
from fastdg.studies.benchmark.algorithms import AGAIN, CONTENDERS, SHARED, WIDTH, hparams_of
from fastdg.studies.benchmark.datasets import DATASETS, missing, rows_of
from fastdg.studies.benchmark.folds import Fold, fold_of
from fastdg.studies.benchmark.plan import Plan, run
from fastdg.studies.experiments import units

SMALL = Plan(None, ("digits",), ("erm", "pcgrad"), seeds=1, trials=2, steps=10)
# Wrappers that need a pre-trained network, texts, images or a function of the user's
ELSEWHERE = {"ADIOS", "DomainOptimizer", "GramSurgery", "MIRO", "RISE"}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[folds.Rows]:
    """Three domains in place of the digits: 40 rows of 6 features, which may be changed."""
    random = np.random.RandomState(0)
    rows = [
        (random.randn(40, 6).astype(np.float32) + d, random.randint(0, 10, 40)) for d in range(3)
    ]
    monkeypatch.setattr(folds, "rows_of", lambda name, data, seed: rows)
    fold_of.cache_clear()
    return rows


def timeless(results: dict[str, Any]) -> Any:
    """What of the runs does not depend on the machine."""
    return {
        key: [{k: v for k, v in trial.items() if k != "cpu"} for trial in unit["trials"]]
        for key, unit in results["runs"].items()
    }


# -- the plan --


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithms": ("mixup",)}, "^algorithms: .*got mixup"),
        ({"datasets": ("imagenet",)}, "^datasets: .*got imagenet"),
        ({"datasets": ("wisdm",)}, "^datasets: none is here .*wisdm.*FASTDG_DATA"),
        ({"seeds": 0}, "^seeds: .*got 0"),
        ({"trials": 0}, "^trials: .*got 0"),
        ({"steps": 9}, "^steps: .*got 9"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)


def test_data_sets_that_are_missing_are_named_and_left_out(tmp_path: Path) -> None:
    asked = replace(SMALL, data=tmp_path, datasets=("wisdm", "digits"))
    assert asked.present() == ("digits",)
    assert asked.skipped() == [f"wisdm: skipped, there is no {tmp_path / 'wisdm/wisdm.npz'}"]
    assert missing("heart", None) == "heart: skipped, FASTDG_DATA is not set"
    assert {unit[1] for unit in asked.units()} == {"digits"}


def test_units_are_every_combination_once() -> None:
    found = list(replace(SMALL, seeds=3).units())
    assert len({key for key, *_ in found}) == len(found) == 3 * 4 * 2
    assert found[1] == ("digits/0/pcgrad/0", "digits", 0, "pcgrad", 0)


def test_every_algorithm_of_the_package_takes_part() -> None:
    public = {
        name
        for name in fastdg.__all__
        if isinstance(kind := getattr(fastdg, name), type)
        and issubclass(kind, fastdg.DomainOptimizer)
    }
    made = {type(network(name).wrapper()).__name__ for name in CONTENDERS}
    assert made == public - ELSEWHERE


def network(name: str) -> Any:
    torch.manual_seed(0)
    return CONTENDERS[name].network(6, 10, 2, hparams_of(name, 0, 20, "digits", 0, 0))


# -- what is trained on --


def sorted_rows(*parts: folds.Part) -> torch.Tensor:
    rows = torch.cat([torch.cat([x, y.unsqueeze(1).float()], 1) for x, y in parts])
    return rows.unique(dim=0)


def test_the_domain_left_out_is_in_no_training_part() -> None:
    every = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in rows_of("digits", None, 3)]
    fold = fold_of("digits", None, 2, 3)
    others = [part for d, part in enumerate(every) if d != 2]
    for own, fit, held in zip(others, fold.fit, fold.held, strict=True):
        assert len(fit[1]) == round(0.8 * len(own[1])) and len(fit[1]) + len(held[1]) == len(own[1])
        assert torch.equal(sorted_rows(fit, held), sorted_rows(own))
    assert torch.equal(sorted_rows(fold.test, fold.peek), sorted_rows(every[2]))
    assert len(fold.test[1]) == round(0.8 * len(every[2][1]))


def test_features_are_prepared_by_the_rows_that_are_trained_on(
    toy: list[folds.Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy[0][0][::4, 1] = np.nan
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], scaled=True))
    fold = fold_of("digits", None, 2, 0)
    x = torch.cat([x for x, _ in fold.fit])
    assert x.mean(0).abs().max() < 1e-6 and x.square().mean(0)[2:].sub(1).abs().max() < 1e-5
    assert (fold.fit[0][0][:, 1] == 0).any()  # the mean in place of what is missing
    # Neither the domain left out nor held-out rows move anything
    toy[2][0][:] *= 100
    held = np.random.RandomState(folds.seed_of("split", "digits", 0, 1)).permutation(40)[32:]
    toy[1][0][held] += 50
    fold_of.cache_clear()
    again = fold_of("digits", None, 2, 0)
    for one, two in zip(fold.fit, again.fit, strict=True):
        assert torch.equal(one[0], two[0])
    assert not torch.equal(fold.test[0], again.test[0])
    assert not torch.equal(fold.held[1][0], again.held[1][0])


def test_columns_are_the_most_frequent_in_the_rows_that_are_trained_on(
    toy: list[folds.Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    for x, _ in toy[:2]:
        x[:, [0, 3]] = 0
    toy[2][0][:, [1, 2, 4]] = 0
    monkeypatch.setitem(DATASETS, "digits", replace(DATASETS["digits"], columns=4))
    fold = fold_of("digits", None, 2, 0)
    assert (fold.fit[0][0] != 0).all()
    assert torch.equal((fold.test[0] != 0).all(0), torch.tensor([False, False, False, True]))


def test_seeds_draw_the_rows_anew() -> None:
    one, two = (fold_of("digits", None, 1, seed).test for seed in (0, 1))
    assert not torch.equal(one[0], two[0])


# -- what is chosen by --


def test_labels_of_the_domain_left_out_change_no_training_and_no_choice() -> None:
    fold = fold_of("digits", None, 1, 0)
    hparams = hparams_of("pcgrad", 0, 20, "digits", 1, 0)
    wrong = replace(
        fold,
        test=(fold.test[0], (fold.test[1] + 1) % 10),
        peek=(fold.peek[0], (fold.peek[1] + 1) % 10),
    )
    one, two = (training.train(f, "pcgrad", hparams, 20, 7) for f in (fold, wrong))
    assert (one["validation"], one["step"]) == (two["validation"], two["step"])
    assert one["test"] > 30 > two["test"] and one["peek"] > 30 > two["peek"]


def test_the_first_best_mean_validation_chooses_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = [10, 40, 80, 80, 70, 60, 50, 40, 30, 20]
    points = iter([{"validation": v, "test": k, "peek": 50 + k} for k, v in enumerate(values)])
    monkeypatch.setattr(training, "_evaluated", lambda model, fold: (next(points), 1.0))
    found = training.train(fold_of("digits", None, 0, 0), "erm", hparams_of("erm", 0, 20, 0), 20, 0)
    assert (found["validation"], found["test"], found["step"]) == (80, 2, 6)
    assert (found["peek"], found["peek_test"]) == (59, 9)


def test_a_run_ends_where_its_loss_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([({"validation": 9.0, "test": 1.0, "peek": 2.0}, math.nan)])
    monkeypatch.setattr(training, "_evaluated", lambda model, fold: next(said))
    fold = fold_of("digits", None, 0, 0)
    found = training.train(fold, "erm", hparams_of("erm", 0, 20, 0), 20, 0)
    assert (found["step"], found["peek_test"]) == (2, 1.0)


def plainly(fold: Fold, hparams: dict[str, Any], steps: int, seed: int) -> tuple[float, float]:
    """ERM in plain torch: accuracy after the last step, validation and test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, fold.classes)
        model = nn.Sequential(first, nn.ReLU(), last)
    decay = hparams["weight_decay"]
    opt = torch.optim.Adam(model.parameters(), lr=hparams["lr"], weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        parts = []
        for x, y in fold.fit:
            rows = torch.randint(len(y), (hparams["batch_size"],), generator=generator)
            parts.append((x[rows], y[rows]))
        opt.zero_grad()
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        F.cross_entropy(model(x), y).backward()
        opt.step()

    def right(part: folds.Part) -> float:
        return 100 * float((model(part[0]).argmax(1) == part[1]).float().mean())

    return sum(map(right, fold.held)) / len(fold.held), right(fold.test)


def test_erm_is_plain_training() -> None:
    fold, hparams = fold_of("digits", None, 2, 1), hparams_of("erm", 1, 60, "digits", 2, 1)
    validation, test = plainly(fold, hparams, 60, 5)
    found = training.train(fold, "erm", hparams, 60, 5)
    assert found["step"] == 60 and test > 50
    assert found["validation"] == pytest.approx(validation, abs=0.5)
    assert found["test"] == pytest.approx(test, abs=0.5)


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_algorithm_trains_and_comes_to_the_same_numbers(name: str) -> None:
    before = torch.get_rng_state()
    steps = 60 if name == "pgrad" else 20
    one, two = (training.search(None, "digits", 3, name, 0, 1, steps) for _ in range(2))
    assert timeless({"runs": {"": one}}) == timeless({"runs": {"": two}})
    assert torch.equal(torch.get_rng_state(), before)
    (trial,) = one["trials"]
    # DomainBed's default threshold of SAND-mask lets no weight move, and GENIE's rate is for steps
    # by the thousand
    assert trial["validation"] > (0 if name in ("sand-mask", "genie") else 15)


# -- the search --


def test_the_first_trial_has_the_defaults_and_others_draw_from_their_names() -> None:
    first = hparams_of("irm", 0, 500, "digits", 0, 0)
    assert (
        first["lr"] == SHARED["lr"][0] and first["irm_lambda"] == 0.1
    )  # a thousandth of DomainBed's
    assert first["irm_penalty_anneal_iters"] == 50  # 500 of DomainBed's 5,000
    drawn = hparams_of("irm", 1, 500, "digits", 0, 0)
    assert drawn == hparams_of("irm", 1, 500, "digits", 0, 0)
    for other in (
        hparams_of("irm", 2, 500, "digits", 0, 0),
        hparams_of("irm", 1, 500, "digits", 1, 0),
        hparams_of("irm", 1, 500, "digits", 0, 1),
        hparams_of("irm", 1, 500, "pacs", 0, 0),
    ):
        assert other["lr"] != drawn["lr"] and other["irm_lambda"] != drawn["irm_lambda"]
    # All algorithms are compared at the same learning rates, but for ERM drawn anew
    erm, again = (hparams_of(name, 1, 500, "digits", 0, 0) for name in ("erm", AGAIN))
    assert erm.items() <= drawn.items() and erm["lr"] != again["lr"]


def test_learning_rates_after_the_anneal_follow_the_trials() -> None:
    found = hparams_of("eqrm", 0, 500, "digits", 0, 0)
    assert found["eqrm_lr"] == pytest.approx(1e-6 / 5e-5 * found["lr"])
    assert found["eqrm_burnin_iters"] == 250
    assert hparams_of("sma", 0, 500, 0)["sma_start"] == 10
    assert hparams_of("pgrad", 0, 500, 0)["pgrad_meta_lr"] == 0.1  # no such rate


def test_all_layers_are_all_layers() -> None:
    head, everything = (network(name).wrapper() for name in ("fishr", "fishr-all"))
    assert len(head.params) == 2 and len(everything.params) == 4


# -- runs --


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 3])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, at: int) -> None:
    whole = run(SMALL, tmp_path / "whole.json")

    def kill(key: str, done: int, total: int) -> None:
        if done == at:
            raise Killed

    path = tmp_path / "killed.json"
    with pytest.raises(Killed):
        run(SMALL, path, progress=kill)
    kept = json.loads(path.read_text())["runs"]
    assert len(kept) == at
    resumed = run(SMALL, path)
    assert timeless(resumed) == timeless(whole) and len(whole["runs"]) == 8
    assert all(resumed["runs"][key] == unit for key, unit in kept.items())  # was not run again


def test_other_settings_are_refused_in_words(tmp_path: Path) -> None:
    run(replace(SMALL, algorithms=("erm",)), tmp_path / "results.json")
    with pytest.raises(ValueError, match="trials was 2, now 3"):
        run(replace(SMALL, trials=3), tmp_path / "results.json")


def test_a_large_file_is_written_now_and_then_and_at_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    written: list[int] = []
    update = units.update_results

    def slow(*arguments: Any) -> Any:
        clock[0] += 1.0  # seconds of a write
        results = update(*arguments)
        written.append(len(results["runs"]))
        return results

    def unit() -> dict[str, Any]:
        clock[0] += 6.0
        if clock[0] > 300:
            raise Killed
        return {}

    monkeypatch.setattr(units, "update_results", slow)
    monkeypatch.setattr(units.time, "monotonic", lambda: clock[0])
    with pytest.raises(Killed):
        units.run_units({str(k): unit for k in range(100)}, {}, tmp_path / "results.json")
    assert written[:4] == [0, 1, 5, 9]  # every 4 units of 6 seconds are more than 20
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == written[-1] > 40


# -- the data sets --


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_data_sets_are_as_described(fastdg_data: Path, name: str) -> None:
    if said := missing(name, fastdg_data):
        pytest.skip(said)
    dataset = DATASETS[name]
    assert len(rows_of(name, fastdg_data, 0)) == len(dataset.domains)
    last = len(dataset.domains) - 1
    fold = fold_of(name, fastdg_data, last, 0)
    assert len(fold.fit) == last and fold.classes == dataset.classes
    for x, y in (*fold.fit, *fold.held, fold.test, fold.peek):
        assert x.isfinite().all() and y.min() >= 0 and y.max() < dataset.classes
        assert len(x) == len(y) <= folds.ROWS
    found = training.search(fastdg_data, name, last, "erm", 0, 1, 20)["trials"][0]
    assert found["test"] > 130 / dataset.classes and found["cpu"] > 0


def test_a_file_that_is_not_as_described_is_said(tmp_path: Path) -> None:
    path = tmp_path / "wisdm/wisdm.npz"
    path.parent.mkdir()
    good = {"x": np.zeros((36, 43), np.float32), "y": np.arange(36) % 6, "d": np.arange(36)}
    for changes, words in (
        ({"x": np.zeros((36, 42), np.float32)}, r"expected x float \(36, 43\), got float32"),
        ({"y": np.zeros(36, np.int64)}, "classes 0 to 5"),
        ({"d": np.arange(36.0)}, "domains 0 to 35"),
    ):
        np.savez(path, **{**good, **changes})
        with pytest.raises(ValueError, match=f"wisdm.npz: .*{words}"):
            DATASETS["wisdm"].read(tmp_path, 0)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"wisdm\.npz: damaged"):
        DATASETS["wisdm"].read(tmp_path, 0)
