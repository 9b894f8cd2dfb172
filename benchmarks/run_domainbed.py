"""Whole training steps in DomainBed: its own classes, and fastdg's in their place.

    DOMAINBED=/path/to/DomainBed FASTDG_DATA=DIR python benchmarks/run_domainbed.py

trains RotatedMNIST (5 domains of 64 images, on MNIST's first 600) by DomainBed's own script, every
algorithm in a process of its own, DomainBed's and fastdg's in turns. Of both it keeps the
``step_time`` that DomainBed logs (the mean of all steps but the first, which warms up and where
fastdg checks its captured gradients) and the peak memory of the process. DomainBed's Fishr runs
with its call of BackPACK repaired.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "domainbed"))
from beds import first_images, repaired
from result_files import keep

from fastdg.domainbed.__main__ import main, script
from fastdg.domainbed.algorithms import ENTRIES
from fastdg.domainbed.plug import find
from fastdg.studies.experiments.machine import machine

RESULTS = Path(__file__).parent / "results" / "domainbed.json"
HPARAMS = {  # their penalties from the first step on; a mask that is not all zeros
    "Fishr": {"penalty_anneal_iters": 0},
    "IRM": {"irm_penalty_anneal_iters": 0},
    "VREx": {"vrex_penalty_anneal_iters": 0},
    "SANDMask": {"tau": 0.5},
}


def one(whose: str, algorithm: str, steps: int, data: str) -> None:
    """In a process of its own: train, and print what is to be kept."""
    warnings.simplefilter("ignore")
    algorithms, datasets = find("algorithms"), find("datasets")
    datasets.MultipleDomainDataset.N_WORKERS = 0  # seventeen loaders of eight processes, else
    own = algorithms.get_algorithm_class
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--algorithm", algorithm, "--dataset", "RotatedMNIST", "--data_dir", data]
        arguments += ["--steps", str(steps), "--checkpoint_freq", str(steps), "--skip_model_save"]
        arguments += ["--output_dir", folder, "--hparams", json.dumps(HPARAMS.get(algorithm, {}))]
        if whose == "fastdg":
            main(arguments)
        else:
            if algorithm == "Fishr":
                algorithms.get_algorithm_class = lambda name: repaired(own(name), algorithms)
            script("train", arguments)
        rows = [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"step_time": rows[-1]["step_time"], "peak_gb": peak}))


def measure(algorithms: list[str], steps: int) -> None:
    """Writes the results after every run; those of other algorithms stay."""
    head = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/run_domainbed.py --steps {steps}",
        "setting": "RotatedMNIST, test env 0, 5 domains of 64 images, MNIST_CNN, float32",
    }
    with tempfile.TemporaryDirectory() as data:
        first_images(Path(os.environ["FASTDG_DATA"]), Path(data))
        for algorithm in algorithms:
            own, row = hasattr(find("algorithms"), algorithm), {}
            for whose in ("domainbed", "fastdg") if own else ("fastdg",):
                command = [sys.executable, __file__, "--steps", str(steps), "--data", data]
                command += ["--one", whose, algorithm]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                row[whose] = json.loads(run.stdout.splitlines()[-1])
                print(algorithm, whose, row[whose], flush=True)
                keep(RESULTS, head, {"rows": {algorithm: row}})


def command_line() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithms", nargs="+", default=[a for a in ENTRIES if a != "RISE"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(*given.one, given.steps, given.data)
        return
    measure(given.algorithms, given.steps)


if __name__ == "__main__":
    command_line()
