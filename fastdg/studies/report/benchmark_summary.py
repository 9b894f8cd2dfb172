"""The benchmark's results, small enough to keep, and what they say of each algorithm."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..benchmark.algorithms import AGAIN, CONTENDERS
from ..benchmark.datasets import DATASETS
from .summary import Estimate, difference, mean_and_error

ERM = "erm"
LEVEL = 0.05  # of the tests


def selected(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Choose among the trials of a unit, the first of the best.

    Returns:
        ``trial`` and ``chosen``: the one with the best accuracy on the training domains' held-out
        parts, and its accuracy on the domain left out; ``oracle``: that accuracy of the trial with
        the best one on the held-out part of the domain left out, after the last step.
    """
    best = max(range(len(trials)), key=lambda k: trials[k]["validation"])
    known = max(trials, key=lambda trial: trial["peek"])
    return {
        "trial": best,
        "chosen": round(trials[best]["test"], 2),
        "oracle": round(known["peek_test"], 2),
    }


def condensed(results: Mapping[str, Any], datasets: Sequence[str] = ()) -> dict[str, Any]:
    """Reduce the results of `benchmark.plan.run` to the choices of each unit.

    Results of a run that is under way can be taken, too: only data sets with every algorithm and
    seed on all domains are kept, or, of the given ``datasets``, the algorithms that are complete
    on all of them.

    Returns:
        ``settings``, ``machine`` and, if known, ``data``; ``algorithms``, ``datasets`` and the
        number of ``seeds``; and ``rows``: ``data set/domain/algorithm`` -> ``chosen``, ``oracle``
        and ``trial``, a value a seed (see `selected`), and ``cpu_ms``, the median processor time of
        a step.

    Raises:
        ValueError: nothing is complete.
    """
    runs = results["runs"]
    keys = [key.split("/") for key in runs]
    seeds = sorted({int(seed) for *_, seed in keys})
    begun = {algorithm for _, _, algorithm, _ in keys}

    def complete(name: str, algorithm: str) -> bool:
        domains = range(len(DATASETS[name].domains))
        return all(f"{name}/{d}/{algorithm}/{s}" in runs for d, s in product(domains, seeds))

    kept = list(datasets) or [name for name in DATASETS if all(complete(name, a) for a in begun)]
    algorithms = [a for a in CONTENDERS if a in begun and all(complete(name, a) for name in kept)]
    if not kept or not algorithms:
        raise ValueError("results: no data set is complete yet. Repeat the command to go on.")
    rows: dict[str, Any] = {}
    for name in kept:
        for d, a in product(range(len(DATASETS[name].domains)), algorithms):
            of = [runs[f"{name}/{d}/{a}/{s}"]["trials"] for s in seeds]
            choices = [selected(trials) for trials in of]
            cpu = statistics.median(trial["cpu"] for trials in of for trial in trials)
            row = {key: [c[key] for c in choices] for key in ("chosen", "oracle", "trial")}
            rows[f"{name}/{d}/{a}"] = {**row, "cpu_ms": round(1e3 * cpu, 2)}
    data = results.get("data")  # versions before kept none
    return {
        "settings": dict(results["settings"]),
        "machine": dict(results["machine"]),
        **({"data": {name: data[name] for name in kept}} if data else {}),
        "algorithms": algorithms,
        "datasets": kept,
        "seeds": len(seeds),
        "rows": rows,
    }


def lines(summary: Mapping[str, Any]) -> str:
    """Return the condensed results as JSON with a line a row."""
    rest = json.dumps({k: v for k, v in summary.items() if k != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in summary["rows"].items())
    return f'{rest[:-2]},\n "rows": {{\n{rows}\n }}\n}}\n'


@dataclass(frozen=True)
class Standing:
    """An algorithm against ERM; accuracies in per cent on the domains left out.

    Attributes:
        algorithm: its name.
        title: in tables and figures.
        accuracy: data set -> mean and standard error over seeds of the mean over domains.
        average: the same, averaged over the data sets.
        oracle: the average where the domain left out chooses.
        rank: among all algorithms, 1 the best; the mean over data sets, over seeds.
        gains: data set -> difference to ERM with the same seed, and whether it is clear.
        gain: of the average.
        better: of all domains, on how many it is above ERM in the mean over seeds.
        worse: and below.
        cost: processor time of a step over ERM's, the median over domains.
        defaults: share of the units in which the default setting was chosen.
    """

    algorithm: str
    title: str
    accuracy: dict[str, Estimate]
    average: Estimate
    oracle: Estimate
    rank: Estimate
    gains: dict[str, tuple[Estimate, bool]]
    gain: tuple[Estimate, bool]
    better: int
    worse: int
    cost: float
    defaults: float

    @property
    def chance(self) -> float:
        """Two-sided sign test over the domains: probability of such a count if both are alike."""
        n, k = self.better + self.worse, min(self.better, self.worse)
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def standings(summary: Mapping[str, Any]) -> list[Standing]:
    """Return ERM first, then the others from the largest gain to the least; ERM has to be there.

    Raises:
        ValueError: the results are without ERM.
    """
    names, datasets, seeds = summary["algorithms"], summary["datasets"], range(summary["seeds"])
    if ERM not in names:
        raise ValueError("algorithms: expected erm among them, which the others are compared with.")
    rows = summary["rows"]

    def of(name: str, dataset: str, key: str = "chosen") -> list[list[float]]:
        """Of each domain a value a seed."""
        domains = range(len(DATASETS[dataset].domains))
        return [rows[f"{dataset}/{d}/{name}"][key] for d in domains]

    def means(name: str, dataset: str, key: str = "chosen") -> list[float]:
        return [statistics.fmean(values) for values in zip(*of(name, dataset, key), strict=True)]

    def overall(name: str, key: str = "chosen") -> list[float]:
        each = [means(name, dataset, key) for dataset in datasets]
        return [statistics.fmean(values) for values in zip(*each, strict=True)]

    ranked = {
        (dataset, seed): _ranks([means(name, dataset)[seed] for name in names])
        for dataset in datasets
        for seed in seeds
    }
    found = []
    for k, name in enumerate(names):
        pairs = [
            statistics.fmean(a) - statistics.fmean(b)
            for dataset in datasets
            for a, b in zip(of(name, dataset), of(ERM, dataset), strict=True)
        ]
        cpu = [
            rows[f"{dataset}/{d}/{name}"]["cpu_ms"] / rows[f"{dataset}/{d}/{ERM}"]["cpu_ms"]
            for dataset in datasets
            for d in range(len(DATASETS[dataset].domains))
        ]
        trials = [
            t for dataset in datasets for values in of(name, dataset, "trial") for t in values
        ]
        found.append(
            Standing(
                name,
                CONTENDERS[name].title,
                {dataset: mean_and_error(means(name, dataset)) for dataset in datasets},
                mean_and_error(overall(name)),
                mean_and_error(overall(name, "oracle")),
                mean_and_error(
                    [statistics.fmean(ranked[dataset, s][k] for dataset in datasets) for s in seeds]
                ),
                {d: _difference(means(name, d), means(ERM, d)) for d in datasets},
                _difference(overall(name), overall(ERM)),
                sum(gap > 0 for gap in pairs),
                sum(gap < 0 for gap in pairs),
                statistics.median(cpu),
                statistics.fmean(trial == 0 for trial in trials),
            )
        )
    return sorted(found, key=lambda s: (s.algorithm != ERM, -s.gain[0][0]))


def _difference(own: Sequence[float], plain: Sequence[float]) -> tuple[Estimate, bool]:
    if len(own) < 2:
        return (own[0] - plain[0], math.nan), False
    found, clear = difference(own, plain)
    return found, clear and found[0] != 0


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the largest; equal values share the mean of their ranks."""
    return [
        sum(other > value for other in values) + (1 + sum(other == value for other in values)) / 2
        for value in values
    ]


def words(summary: Mapping[str, Any]) -> list[str]:
    """Return sentences about the numbers, computed from them alone."""
    table = standings(summary)
    others = [s for s in table if s.algorithm not in (ERM, AGAIN)]
    if not others:
        return ["Nothing to compare: run erm and other algorithms."]
    if summary["seeds"] < 2:
        return ["One seed proves nothing: differences to ERM have no standard error."]

    def listed(clear: list[Standing]) -> str:
        return ", ".join(f"{s.title} ({s.gain[0][0]:+.1f})" for s in clear) or "none"

    better = [s for s in others if s.gain[1] and s.gain[0][0] > 0]
    worse = [s for s in others if s.gain[1] and s.gain[0][0] < 0]
    several = len(summary["datasets"])
    said = [
        f"Averaged over {several} data set{'s' * (several > 1)}, {len(better)} of {len(others)} "
        f"algorithms are clearly better than ERM (the 95 % interval over {summary['seeds']} seeds "
        f"leaves out 0): {listed(better)}. Clearly worse are {len(worse)}: {listed(worse[::-1])}.",
        f"If all were alike, about {LEVEL * len(others) / 2:.0f} on either side would look so by "
        "chance.",
    ]
    again = next((s for s in table if s.algorithm == AGAIN), None)
    if again is not None:
        (gain, error), _ = again.gain
        noise = max(abs(gain), 2 * error)
        close = [s for s in others if abs(s.gain[0][0]) <= noise]
        said.append(
            f"ERM with other random numbers differs from itself by {gain:+.1f} ± {error:.1f}: "
            f"{len(close)} of the {len(others)} algorithms are within {noise:.1f} points of ERM, "
            "which is noise."
        )
    signs = [s for s in others if s.chance < LEVEL / len(others)]
    counted = ", ".join(f"{s.title} ({s.better} of {s.better + s.worse})" for s in signs)
    said.append(
        f"By the sign test over the domains left out, at a level of 5 % for all {len(others)} "
        f"together (Bonferroni), different from ERM: {counted or 'none'} (domains above ERM)."
    )
    return said
