"""ColoredMNIST as in the paper's own script: two training environments, full batch, 501 steps.

Labels are ``digit < 5`` flipped with probability 0.25. The colour is the label flipped with
probability 0.2 and 0.1 in training and 0.9 in the test environment, so that it predicts better than
the shape in training and misleads in the test. A model that ignores it is right in at most 75 %.

Reference:
    Arjovsky, Bottou, Gulrajani, Lopez-Paz: Invariant Risk Minimization, 2019 (the data);
    Rame, Dancette, Cord: Fishr, ICML 2022 (the protocol and its hyper-parameters).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import Fishr
from ..data.mnist import fingerprint, read_train
from .machine import machine
from .storage import (
    DATA,
    load_checkpoint,
    load_results,
    save_atomically,
    update_results,
    with_data,
)
from .units import check_names

ALGORITHMS = ("erm", "fishr")
SAVED = ("model", "optimizer", "curve", "step", "seconds")  # in a checkpoint
# The paper's results over 10 restarts (mean, std) in per cent; below, the tolerances here
PAPER = {
    "erm": {"train": (86.4, 0.2), "test": (14.0, 0.7), "grey": (71.0, 0.7)},
    "fishr": {"train": (71.0, 0.9), "test": (69.5, 1.0), "grey": (70.2, 1.1)},
}
TEST_SIZE = 10_000  # the last of MNIST's training images
TOLERANCE = {
    "erm": {"train": 1.0, "test": 3.0, "grey": 3.0},
    "fishr": {"train": 2.5, "test": 3.0, "grey": 3.5},
}


@dataclass(frozen=True)
class Protocol:
    """The script's hyper-parameters; ``steps`` and ``train_size`` are only ever changed by
    tests."""

    steps: int = 501
    hidden: int = 390
    lr: float = 4.898536566546834e-4
    l2: float = 1.10794568e-3
    anneal_steps: int = 190
    penalty_weight: float = 91257.18613115903
    label_flip: float = 0.25
    train_size: int = 50_000


@dataclass
class Restart:
    """One run: its final accuracies in per cent, and the curve that led there."""

    algorithm: str
    seed: int
    final: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds_per_step: float = 0.0


def environments(images: Tensor, digits: Tensor, seed: int, protocol: Protocol) -> dict[str, Any]:
    """``train`` (both environments and their ids), ``test`` and ``grey`` from MNIST's 60,000
    training images."""
    generator = torch.Generator().manual_seed(seed)
    needed = protocol.train_size + TEST_SIZE
    if len(images) < needed:
        raise ValueError(
            f"data: expected MNIST's {needed:,} images, got {len(images):,}. Pass the training set."
        )
    last = len(images) - TEST_SIZE
    order = torch.randperm(last, generator=generator)[: protocol.train_size]

    def environment(x: Tensor, y: Tensor, colour_flip: float) -> tuple[Tensor, Tensor, Tensor]:
        def flips(probability: float) -> Tensor:
            return (torch.rand(len(y), generator=generator) < probability).float()

        x = x[:, ::2, ::2].float() / 255
        labels = ((y < 5).float() - flips(protocol.label_flip)).abs()
        colours = (labels - flips(colour_flip)).abs().long()
        coloured = torch.stack([x, x], 1)
        coloured[torch.arange(len(y)), 1 - colours] = 0
        return coloured.flatten(1), labels, torch.stack([x, x], 1).flatten(1)

    first = environment(images[order[0::2]], digits[order[0::2]], 0.2)
    second = environment(images[order[1::2]], digits[order[1::2]], 0.1)
    test = environment(images[last:], digits[last:], 0.9)
    domains = torch.cat([torch.full((len(e[1]),), d) for d, e in enumerate((first, second))])
    return {
        "train": (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])),
        "domains": domains,
        "test": (test[0], test[1]),
        "grey": (test[2], test[1]),
    }


def network(seed: int, hidden: int) -> nn.Sequential:
    """392 -> hidden -> hidden -> 1 with ReLU; Xavier-uniform weights, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(392, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
    return model


def optimizer(model: nn.Module, algorithm: str, protocol: Protocol) -> Fishr:
    """Adam in `fastdg.Fishr` with the script's switches. ERM is the same with both weights at 0."""
    fishr = algorithm == "fishr"
    return Fishr(
        torch.optim.Adam(model.parameters(), lr=protocol.lr),
        params="head",
        penalty_weight=protocol.penalty_weight if fishr else 0.0,
        pre_anneal_weight=1.0 if fishr else 0.0,
        anneal_steps=protocol.anneal_steps,
        ema=None,
        reduction="sum",
        reset_base=False,
        num_domains=2,
    )


def step(
    model: nn.Module, opt: Fishr, data: dict[str, Any], count: int, protocol: Protocol
) -> Tensor:
    """One full-batch step on mean loss + l2 |w|^2 + weight * penalty.

    Once the weight exceeds 1 all of that is divided by it, which Adam's moments from before turn
    into much smaller steps. ERM has no weight and is never divided: the same division without a
    penalty would stop its training at the anneal (85.0 / 10.5 / 71.9 instead of the paper's
    86.4 / 14.0 / 71.0).
    """
    x, y = data["train"]
    losses = F.binary_cross_entropy_with_logits(model(x)[:, 0], y, reduction="none")
    opt.zero_grad()
    loss = opt.backward(losses, data["domains"])
    weight = opt.penalty_weight if count >= protocol.anneal_steps else opt.pre_anneal_weight
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(p.detach(), alpha=2 * protocol.l2).div_(max(weight, 1.0))
    opt.step()
    return loss


@torch.no_grad()
def accuracies(model: nn.Module, data: dict[str, Any]) -> dict[str, float]:
    """Accuracy in per cent on ``train`` (mean of the environments), ``test`` and ``grey``."""
    out = {}
    for name in ("train", "test", "grey"):
        x, y = data[name]
        out[name] = 100 * float(((model(x)[:, 0] > 0).float() == y).float().mean())
    return out


def run(
    algorithm: str,
    seed: int,
    data_dir: Path,
    checkpoint: Path,
    protocol: Protocol | None = None,
    progress: Callable[[int], None] = lambda done: None,
    every: int = 50,
) -> Restart:
    """One restart; continues from ``checkpoint`` if a run was killed there, to the same numbers.

    Args:
        algorithm: ``"erm"`` or ``"fishr"``.
        seed: of the data, the initialisation, everything.
        data_dir: where MNIST's idx files are.
        checkpoint: written every ``every`` steps, atomically; removed by the caller when the
            result is kept.
        protocol: the script's hyper-parameters by default.
        progress: called with the number of steps done.
        every: steps between checkpoints.
    """
    protocol = protocol or Protocol()
    data = environments(*read_train(data_dir), seed, protocol)
    model = network(seed, protocol.hidden)
    opt = optimizer(model, algorithm, protocol)
    result, start, seconds = Restart(algorithm, seed), 0, 0.0
    identity = {"algorithm": algorithm, "seed": seed, **asdict(protocol)}
    if (saved := load_checkpoint(checkpoint, identity, SAVED)) is not None:
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        result.curve, start, seconds = saved["curve"], saved["step"], saved["seconds"]
    for count in range(start, protocol.steps):
        began = time.perf_counter()
        loss = step(model, opt, data, count, protocol)
        seconds += time.perf_counter() - began
        if count % 100 == 0 or count == protocol.steps - 1:
            penalty = float(opt.statistics["penalty"])
            point = {"step": count, "loss": float(loss), "penalty": penalty}
            result.curve.append({**point, **accuracies(model, data)})
        progress(count + 1)
        if (count + 1) % every == 0 and count + 1 < protocol.steps:
            state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
            more = {"curve": result.curve, "step": count + 1, "seconds": seconds}
            save_atomically({**state, **more, "identity": identity}, checkpoint)
    result.final = {k: result.curve[-1][k] for k in ("train", "test", "grey")}
    result.seconds_per_step = seconds / protocol.steps
    return result


def run_all(
    algorithms: tuple[str, ...],
    restarts: int,
    data_dir: Path,
    output: Path,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    protocol: Protocol | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """All restarts of all algorithms; goes on from ``output`` after a kill.

    Several runs may add to one ``output`` at the same time. Of a restart that two of them run, the
    result that is written first stays. ``fresh`` ignores earlier results.

    Returns:
        The content of ``results.json``: ``protocol``, ``machine``, ``command`` and, for each
        algorithm, its ``restarts`` and a ``summary`` beside the paper's numbers.

    Raises:
        ValueError: an unknown algorithm; ``output`` holds a run with other settings, or a damaged
            file.
        OSError: a file cannot be read or written.
    """
    protocol = protocol or Protocol()
    check_names("algorithms", algorithms, ALGORITHMS)
    if restarts < 1:
        raise ValueError(f"seeds: expected >= 1, got {restarts}. Pass a larger number.")
    read_train(data_dir)  # missing or damaged files before anything is written
    data = {"mnist": fingerprint(data_dir)}
    path = output / "results.json"
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in algorithms}

    def load(path: Path) -> dict[str, Any] | None:
        return load_results(path, "protocol", asdict(protocol), _valid)

    def change(found: dict[str, Any] | None) -> dict[str, Any]:
        """Add the restarts of this run that the file lacks."""
        entries = {} if found is None else found["algorithms"]
        for name in algorithms:
            there = entries.get(name, {"restarts": []})["restarts"]
            seeds = {restart["seed"] for restart in there}
            there = there + [restart for restart in made[name] if restart["seed"] not in seeds]
            if there:
                entries[name] = {"restarts": there, "summary": summary(name, there)}
        return {
            "command": f"fastdg reproduce colored-mnist --seeds {restarts}",
            "machine": machine(),
            "protocol": asdict(protocol),
            **with_data(path, found, data),
            "algorithms": {n: entries[n] for n in (*algorithms, *entries) if n in entries},
        }

    results = update_results(path, (lambda path: None) if fresh else load, change)
    total = protocol.steps * restarts * len(algorithms)
    done = 0
    for seed in range(restarts):
        for name in algorithms:
            there = results["algorithms"].get(name, {"restarts": []})["restarts"]
            if all(restart["seed"] != seed for restart in there):
                checkpoint = output / f"{name}-{seed}.checkpoint"
                if fresh:
                    checkpoint.unlink(missing_ok=True)

                def show(count: int, name: str = name, seed: int = seed, done: int = done) -> None:
                    progress(f"{name}, restart {seed}", done + count, total)

                restart = run(name, seed, data_dir, checkpoint, protocol, show)
                made[name].append(asdict(restart))
                results = update_results(path, load, change)
                checkpoint.unlink(missing_ok=True)
            done += protocol.steps
            progress(f"{name}, restart {seed}", done, total)
    return results


def _valid(results: dict[str, Any]) -> bool:
    names = {"command", "machine", "protocol", "algorithms"}
    restarts = [r for entry in results["algorithms"].values() for r in entry["restarts"]]
    return (
        results.keys() - {DATA} == names
        and results["algorithms"].keys() <= set(ALGORITHMS)
        and all(r.keys() == set(Restart.__dataclass_fields__) for r in restarts)
        and all(r["final"].keys() >= {"train", "test", "grey"} for r in restarts)
    )


def summary(algorithm: str, restarts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the final accuracies, beside the paper's."""
    out = {}
    for key, paper in PAPER[algorithm].items():
        values = [restart["final"][key] for restart in restarts]
        mean, tolerance = statistics.fmean(values), TOLERANCE[algorithm][key]
        out[key] = {
            "mean": mean,
            "std": statistics.pstdev(values),
            "paper": list(paper),
            "tolerance": tolerance,
            "within": abs(mean - paper[0]) <= tolerance,
        }
    return out
