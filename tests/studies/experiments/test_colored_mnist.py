"""The ColoredMNIST protocol: its data, its arithmetic against a plain derivation, and resuming."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdg.studies.data.mnist import IMAGES, LABELS
from fastdg.studies.experiments import colored_mnist as experiment
from fastdg.studies.experiments.colored_mnist import ALGORITHMS, Protocol

SMALL = Protocol(steps=5, hidden=6, anneal_steps=2, train_size=40)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like MNIST's, with 40 noise images to train on and the 10,000 to test on."""
    folder = tmp_path_factory.mktemp("mnist")
    random = np.random.default_rng(0)
    count = 10_000 + SMALL.train_size
    images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    digits = random.integers(0, 10, count, dtype=np.uint8)
    head = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
    (folder / IMAGES).write_bytes(head + images.tobytes())
    (folder / LABELS).write_bytes(struct.pack(">4B1I", 0, 0, 8, 1, count) + digits.tobytes())
    return folder


def noise(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(1, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.randint(10, (count,), generator=generator)


def test_environments_are_what_the_protocol_says() -> None:
    protocol = Protocol(train_size=20_000)
    images, digits = noise(30_000)
    data = experiment.environments(images, digits, 0, protocol)
    x, y = data["train"]
    assert x.shape == (20_000, 392) and data["test"][0].shape == (10_000, 392)
    assert torch.bincount(data["domains"]).tolist() == [10_000, 10_000]
    for name, rows, flip in (
        ("train", slice(0, 10_000), 0.2),
        ("train", slice(10_000, None), 0.1),
        ("test", slice(None), 0.9),
    ):
        x, y = (tensor[rows] for tensor in data[name])
        ink = x.view(-1, 2, 196).sum(2) > 0
        assert (ink.sum(1) == 1).all()
        assert abs(float((ink[:, 1] != y.bool()).float().mean()) - flip) < 0.015
    x, y = data["test"]
    assert abs(float((y.bool() != (digits[-10_000:] < 5)).float().mean()) - 0.25) < 0.015
    small = images[-10_000:, ::2, ::2].float().flatten(1) / 255
    assert torch.equal(x.view(-1, 2, 196).sum(1), small)
    assert torch.equal(data["grey"][0], torch.cat([small, small], 1))
    assert torch.equal(data["grey"][1], y)


def plainly(model: nn.Sequential, data: dict[str, Any], protocol: Protocol, fishr: bool) -> None:
    """The same steps, sample by sample, in plain autograd."""
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.lr)
    x, y = data["train"]
    head = list(model[-1].parameters())
    for count in range(protocol.steps):
        means, variances = [], []
        for d in range(2):
            losses = [
                F.binary_cross_entropy_with_logits(model(x[i])[0], y[i])
                for i in (data["domains"] == d).nonzero()[:, 0]
            ]
            grads = torch.stack(
                [
                    torch.cat(
                        [g.flatten() for g in torch.autograd.grad(one, head, create_graph=True)]
                    )
                    for one in losses
                ]
            )
            means.append(torch.stack(losses).mean())
            variances.append(((grads - grads.mean(0)) ** 2).mean(0))
        middle = (variances[0] + variances[1]) / 2
        penalty = sum(((v - middle) ** 2).sum() for v in variances)
        weight = 0.0
        if fishr:
            weight = protocol.penalty_weight if count >= protocol.anneal_steps else 1.0
        norm = sum((p**2).sum() for p in model.parameters())
        objective = (means[0] + means[1]) / 2 + protocol.l2 * norm + weight * penalty
        if weight > 1:
            objective = objective / weight
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_steps_are_those_of_a_plain_derivation(algorithm: str) -> None:
    protocol = Protocol(steps=3, hidden=7, anneal_steps=2, train_size=30)
    data = experiment.environments(*noise(10_030), 1, protocol)
    data["train"] = tuple(tensor.double() for tensor in data["train"])
    here, plain = (experiment.network(1, 7).double() for _ in range(2))
    opt = experiment.optimizer(here, algorithm, protocol)
    for count in range(protocol.steps):
        experiment.step(here, opt, data, count, protocol)
    plainly(plain, data, protocol, algorithm == "fishr")
    for p, q in zip(here.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_the_protocol_is_the_scripts() -> None:
    protocol = Protocol()
    assert asdict(protocol) == {
        "steps": 501,
        "hidden": 390,
        "lr": 0.0004898536566546834,
        "l2": 0.00110794568,
        "anneal_steps": 190,
        "penalty_weight": 91257.18613115903,
        "label_flip": 0.25,
        "train_size": 50_000,
    }
    model = experiment.network(0, protocol.hidden)
    assert sum(p.numel() for p in model.parameters()) == 392 * 390 + 390 + 390 * 390 + 390 + 391
    assert not any(layer.bias.any() for layer in model[::2])
    opt = experiment.optimizer(model, "fishr", protocol)
    assert (opt.ema, opt.reduction, opt.pre_anneal_weight) == (None, "sum", 1.0)
    assert opt.reset_base is False and opt.params == "head"


class Killed(Exception):
    pass


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_killed_run_goes_on_to_the_same_numbers(
    mnist: Path, tmp_path: Path, algorithm: str, at: int
) -> None:
    whole = experiment.run(algorithm, 0, mnist, tmp_path / "whole", SMALL)

    def kill(done: int) -> None:
        if done == at:
            raise Killed

    checkpoint = tmp_path / "killed"
    with pytest.raises(Killed):
        experiment.run(algorithm, 0, mnist, checkpoint, SMALL, kill, every=2)
    assert checkpoint.exists() == (at > 2)
    steps: list[int] = []
    resumed = experiment.run(algorithm, 0, mnist, checkpoint, SMALL, steps.append, every=2)
    assert steps[0] == (3 if at > 2 else 1)
    assert resumed.curve == whole.curve and resumed.final == whole.final


def test_all_restarts_are_kept_summed_up_and_not_run_twice(mnist: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    first = experiment.run_all(("erm",), 2, mnist, tmp_path, protocol=SMALL)
    results = experiment.run_all(
        ("erm", "fishr"), 2, mnist, tmp_path, lambda *now: told.append(now), SMALL
    )
    assert results["algorithms"]["erm"] == first["algorithms"]["erm"]
    assert told[-1][1:] == (20, 20)
    assert {name.split(",")[0] for name, done, _ in told if done % 5} == {"fishr"}
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written.pop("sha256")) == 64 and results == written
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    for entry in results["algorithms"].values():
        finals = [restart["final"]["test"] for restart in entry["restarts"]]
        assert entry["summary"]["test"]["mean"] == pytest.approx(np.mean(finals))
        assert entry["summary"]["test"]["std"] == pytest.approx(np.std(finals))
        assert entry["summary"]["test"]["within"] in (True, False)


def test_runs_of_two_terminals_add_to_one_file(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run begins and ends within the first one's first restart."""
    alone = experiment.run_all(("erm", "fishr"), 2, mnist, tmp_path / "alone", protocol=SMALL)
    path, own, begun = tmp_path / "results.json", experiment.run, []

    def overtaken(name: str, seed: int, *arguments: Any) -> Any:
        begun.append((name, seed))
        if len(begun) == 1:
            experiment.run_all(("erm",), 2, mnist, tmp_path, protocol=SMALL)
        return own(name, seed, *arguments)

    monkeypatch.setattr(experiment, "run", overtaken)
    both = experiment.run_all(("fishr", "erm"), 2, mnist, tmp_path, protocol=SMALL)
    assert begun == [("fishr", 0), ("erm", 0), ("erm", 1), ("fishr", 1)]  # each of them once
    for results in (both, json.loads(path.read_text())):
        for name, entry in results["algorithms"].items():
            finals = [restart["final"] for restart in entry["restarts"]]
            assert finals == [r["final"] for r in alone["algorithms"][name]["restarts"]]
    monkeypatch.setattr(experiment, "run", own)
    fresh = experiment.run_all(("erm",), 1, mnist, tmp_path, protocol=SMALL, fresh=True)
    assert list(fresh["algorithms"]) == ["erm"]
    assert len(fresh["algorithms"]["erm"]["restarts"]) == 1


def test_other_settings_are_refused_in_words(mnist: Path, tmp_path: Path) -> None:
    experiment.run_all(("erm",), 1, mnist, tmp_path, protocol=SMALL)
    with pytest.raises(ValueError, match=r"hidden was 6, now 7"):
        other = Protocol(**{**asdict(SMALL), "hidden": 7})
        experiment.run_all(("erm",), 1, mnist, tmp_path, protocol=other)

    def kill(done: int) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        experiment.run("erm", 0, mnist, tmp_path / "one", SMALL, kill, every=2)
    with pytest.raises(ValueError, match=r"seed was 0, now 1"):
        experiment.run("erm", 1, mnist, tmp_path / "one", SMALL)
    (tmp_path / "one").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"damaged, or of another kind .* Remove it to start"):
        experiment.run("erm", 1, mnist, tmp_path / "one", SMALL)


def test_too_few_images_and_unknown_algorithms_are_refused(mnist: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data: .*got 10,?040"):
        experiment.run("erm", 0, mnist, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"^algorithms: .*got irm"):
        experiment.run_all(("irm",), 1, mnist, tmp_path)
    with pytest.raises(ValueError, match=r"^seeds: .*got 0"):
        experiment.run_all(("erm",), 0, mnist, tmp_path)
    assert not list(tmp_path.iterdir())
