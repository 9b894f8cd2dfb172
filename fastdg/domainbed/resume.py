"""Resume killed runs of DomainBed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..files import load_torch, replace

FILE = "fastdg_checkpoint.pt"

REMEDY = "Remove it to start its run anew."
PARTS = "arguments run batch values accuracies random cuda model optimizer results"

Minibatches = Sequence[tuple[Tensor, Tensor]]
Accuracy = Callable[[Any, Iterable[Any], Any, Any], float]


class Refused(RuntimeError):
    """A run that cannot start; the text has the reason and the remedy."""


class Trained(Protocol):
    """The algorithm of a run."""

    hparams: Mapping[str, Any]
    state_dict: Callable[[], Mapping[str, Any]]
    load_state_dict: Callable[[Mapping[str, Any]], Any]

    def train_step(self, minibatches: Minibatches) -> dict[str, float]:
        """Make one step; returns the values that DomainBed logs."""

    def wrapper(self) -> Optimizer:
        """Return the optimizer that makes the steps."""


class Journal:
    """All values that a run has returned to DomainBed's training script, and its last checkpoint.

    The script always begins at step 0. A run that goes on answers it from the journal, up to the
    step of the checkpoint: nothing is computed, but every batch is drawn, so that the data (with
    their augmentations, in their workers) come in the order in which they came. From there on all
    numbers equal the numbers of a run that was never killed.

    A checkpoint is written at the first step after an evaluation, whole or not at all, and deleted
    when the run is done.

    Args:
        folder: the run's ``--output_dir``.
        arguments: all of its arguments.
        accuracy: DomainBed's evaluation.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], accuracy: Accuracy) -> None:
        self.arguments = list(arguments)
        self.path, self.results = folder / FILE, folder / "results.jsonl"
        self._accuracy = accuracy
        self.values: list[dict[str, float]] = []  # that `update` returned
        self.accuracies: list[float] = []
        self.random: dict[int, Tensor] = {}  # step that drew random numbers -> generator's state
        self.evaluated = False  # since the last checkpoint
        self.saved: dict[str, Any] | None = None  # until it is restored
        if unfinished(self.path):
            self.saved = load(self.path)

    def update(self, algorithm: Trained, minibatches: Minibatches) -> dict[str, float]:
        """Make a step of the algorithm, or return the values of the step that was made before."""
        step = len(self.values)
        if step == 0:
            self.run = identity(algorithm, minibatches)
            if self.saved is not None:
                self._check(self.saved["run"], self.run)
                print(f"fastdg: goes on at step {len(self.saved['values'])}, from {self.path}")
                self.results.unlink(missing_ok=True)  # its rows are written again on the way there
        if self.saved is not None and step < len(self.saved["values"]):
            if step in self.saved["random"]:
                torch.set_rng_state(self.saved["random"][step])
            self.values.append(self.saved["values"][step])
            return self.values[-1]
        if self.saved is not None:
            self._restore(algorithm, minibatches)
        elif self.evaluated:
            self._save(algorithm, minibatches)
        before = torch.get_rng_state()
        self.values.append(algorithm.train_step(minibatches))
        after = torch.get_rng_state()
        if not torch.equal(before, after):
            self.random[step] = after
        return self.values[-1]

    def accuracy(self, network: Any, loader: Iterable[Any], weights: Any, device: Any) -> float:
        """In place of ``domainbed.lib.misc.accuracy``."""
        k = len(self.accuracies)
        if self.saved is not None and k < len(self.saved["accuracies"]):
            for _ in loader:  # which draws its next order
                pass
            self.accuracies.append(self.saved["accuracies"][k])
        else:
            self.accuracies.append(self._accuracy(network, loader, weights, device))
        self.evaluated = True
        return self.accuracies[-1]

    def done(self) -> None:
        """End the run: its checkpoint is removed."""
        self.path.unlink(missing_ok=True)

    def _save(self, algorithm: Trained, minibatches: Minibatches) -> None:
        state = {
            "arguments": self.arguments,
            "run": self.run,
            "batch": fingerprint(minibatches),
            "values": self.values,
            "accuracies": self.accuracies,
            "random": self.random,
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "model": algorithm.state_dict(),
            "optimizer": algorithm.wrapper().state_dict(),
            "results": self.results.read_bytes(),
        }
        replace(self.path, lambda file: torch.save(state, file))
        self.evaluated = False

    def _restore(self, algorithm: Trained, minibatches: Minibatches) -> None:
        saved, self.saved = self.saved, None
        assert saved is not None
        replace(self.results, lambda file: file.write(saved["results"]))
        self._check({"batch": saved["batch"]}, {"batch": fingerprint(minibatches)})
        opt = (
            algorithm.wrapper()
        )  # before the weights are loaded: the present ones may be an oracle
        algorithm.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        if saved["cuda"]:
            torch.cuda.set_rng_state_all(saved["cuda"])
        self.random = saved["random"]
        self.evaluated = False

    def _check(self, saved: dict[str, str], here: dict[str, str]) -> None:
        for name, value in saved.items():
            if value != here[name]:
                raise Refused(
                    f"{self.path}: it belongs to another run, whose {name} at step "
                    f"{len(self.values)} was {value}, got {here[name]}. Pass the arguments of that "
                    "run or another --output_dir, or delete the file to start anew."
                )


def unfinished(path: Path) -> bool:
    """Return whether this is the checkpoint of a run that has not ended."""
    return path.exists() and not (path.parent / "done").exists()


def runs_to_resume(folder: Path) -> list[list[str]]:
    """Return the arguments of the unfinished runs in ``folder`` and below it."""
    return [
        load(path, whole=False)["arguments"]
        for path in sorted(folder.rglob(FILE))
        if unfinished(path)
    ]


def load(path: Path, whole: bool = True) -> dict[str, Any]:
    """Return the checkpoint at ``path``; without ``whole``, tensors are read when they are used.

    Raises:
        Refused: it cannot be read, is damaged, or is no checkpoint of a run.
    """
    try:
        saved = load_torch(path, REMEDY, whole)
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error
    if not isinstance(saved, dict) or not saved.keys() >= set(PARTS.split()):
        raise Refused(f"{path}: not a checkpoint of a run of DomainBed. {REMEDY}")
    return saved


def identity(algorithm: Trained, minibatches: Minibatches) -> dict[str, str]:
    """Return the identity of a run, at its first step."""
    return {
        "algorithm": type(algorithm).__name__,
        "hparams": json.dumps(algorithm.hparams, sort_keys=True),
        "batch": fingerprint(minibatches),
    }


def fingerprint(minibatches: Minibatches) -> str:
    """Return a digest of the data."""
    digest = hashlib.sha256()
    for x, y in minibatches:
        for tensor in (x, y):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
