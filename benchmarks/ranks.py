"""What does a step cost on several ranks, beside one of DistributedDataParallel alone?

``python benchmarks/ranks.py`` starts two ranks with one thread each (gloo), trains each model in
every way in turns, and writes ``results/ranks.json``. To reach: 1.10 times as much for Fishr on the
head and for Agr-Sum. What counts is the median of the rounds' ratios, since what else the machine
does comes and goes. A rank's weights have to be those of the other after the run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import environment, summary
from models import problem
from result_files import keep
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import fastdg

RESULTS = Path(__file__).parent / "results" / "ranks.json"
RANKS, DOMAINS = 2, 3
# name -> samples a rank, rounds
MODELS = {"resnet18": (48, 20), "mnist_cnn": (48, 60)}
WAYS: dict[str, Callable[[Any], Any] | None] = {
    "ddp": None,
    "fishr": lambda base: fastdg.Fishr(base, anneal_steps=0, reset_base=False),
    "agrsum": fastdg.AgrSum,
    "agrsum, a domain a rank": fastdg.AgrSum,
    "pcgrad": lambda base: fastdg.PCGrad(base, generator=torch.Generator().manual_seed(0)),
}
Step = Callable[[], None]


def made(way: str, name: str, samples: int, rank: int) -> tuple[torch.nn.Module, Step]:
    """A model and a training step of it."""
    on = problem(name, samples)
    model = DistributedDataParallel(on.model)
    base: Any = torch.optim.Adam(on.model.parameters(), lr=1e-5)
    wrap = WAYS[way]
    opt = base if wrap is None else wrap(base)
    x = on.x + 0.1 * rank
    domains = torch.full_like(on.domains, rank) if "a rank" in way else on.domains

    def step() -> None:
        losses: Tensor = F.cross_entropy(model(x), on.y, reduction="none")
        opt.zero_grad()
        if wrap is None:
            losses.mean().backward()
        else:
            opt.backward(losses, domains)
        opt.step()

    return on.model, step


def measured(rank: int, store: str, name: str, samples: int, rounds: int, out: Any) -> None:
    """Time every way in turns; a step ends when both ranks have made it."""
    torch.set_num_threads(1)
    files = distributed.FileStore(store, RANKS)
    distributed.init_process_group("gloo", store=files, rank=rank, world_size=RANKS)
    runs = {way: made(way, name, samples, rank) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 2):
        first = turn % len(WAYS)
        for way in [*WAYS, *WAYS][first : first + len(WAYS)]:
            _, step = runs[way]
            distributed.barrier()
            start = time.perf_counter()
            step()
            distributed.barrier()
            if turn > 1:  # the first is checked, the second finds its buckets
                times[way].append(time.perf_counter() - start)
    for way, (model, _) in runs.items():
        for p in model.parameters():
            first = p.detach().clone()
            distributed.broadcast(first, 0)
            assert torch.equal(first, p), f"{way}: the ranks have different weights"
    if rank == 0:
        plain = times["ddp"]
        rows = {}
        for way, seen in times.items():
            ratio = statistics.median(t / p for t, p in zip(seen, plain, strict=True))
            rows[way] = {**summary(seen), "ratio": ratio}
        out.put(rows)
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="the others stay")
    parser.add_argument("--rounds", type=int, help="default: enough for a median")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    head = {"environment": environment("python benchmarks/ranks.py")}
    for name in arguments.models:
        samples, rounds = MODELS[name]
        out = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            common = (f"{folder}/store", name, samples, arguments.rounds or rounds, out)
            ranks = [
                context.Process(target=measured, args=(rank, *common)) for rank in range(RANKS)
            ]
            for process in ranks:
                process.start()
            rows = out.get()
            for process in ranks:
                process.join()
        print(f"{name}, {samples} samples a rank, {RANKS} ranks of one thread")
        for way, row in rows.items():
            print(f"  {way:26} {row['median'] * 1e3:8.1f} ms {row['ratio']:6.2f}x")
        keep(RESULTS, head, {"rows": {name: rows}})


if __name__ == "__main__":
    main()
