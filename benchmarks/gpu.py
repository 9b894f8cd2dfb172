"""Prove and time fastdg on a GPU: one command a part, rows of JSON into a folder, a table.

NOT YET RUN ON A GPU. Every part is rehearsed on the CPU (``--device cpu --small``, which
tests/test_gpu_script.py does), so that its code is known to work; there is no result of it yet.

    python benchmarks/gpu.py build --out FOLDER      the extension, in place: FASTDG_BUILD=cuda
    python benchmarks/gpu.py tests --out FOLDER --shard 1/4
    python benchmarks/gpu.py sanitizer --out FOLDER
    python benchmarks/gpu.py ops --out FOLDER        errors; shares of cuBLAS and of a copy
    python benchmarks/gpu.py steps --out FOLDER      ResNet-50 and ViT-B/16, 224 px, N=96
    python benchmarks/gpu.py waits --out FOLDER      syncs, and capture in CUDA graphs
    python benchmarks/gpu.py table --out FOLDER      measured beside predicted

`gpu.sh` calls all. A part ends after ``--seconds`` and a last row; called again, it makes the rows
that are not there, and those that failed. Its exit status is 3 while rows are left, 1 if one
failed. ``predict`` writes benchmarks/results/gpu_predictions.json and .md, on any machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

PARTS = {
    "build": ("gpu_build", "run"),
    "tests": ("gpu_tests", "run"),
    "sanitizer": ("gpu_tests", "sanitizer"),
    "ops": ("gpu_ops", "run"),
    "steps": ("gpu_step_rows", "run"),
    "waits": ("gpu_step_rows", "waits"),
    "one-capture": ("gpu_step_rows", "one_capture"),
    "predict": ("gpu_predict", "run"),
    "table": ("gpu_table", "run"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of a rehearsal")
    parser.add_argument("--seconds", type=float, default=420, help="begin no row after these")
    parser.add_argument("--only", default="", help="rows with these words")
    parser.add_argument("--shard", default="1/1", help="K/N of the tests")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.part not in ("predict", "build"):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, at Triton's first import
    import torch
    from gpu_rig import Rig

    measured = options.part not in ("predict", "table")
    if measured and options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu.py: torch.cuda.is_available() is False; pass --device cpu")
    out = options.out.resolve()
    rig = Rig(options.device, options.small, out, options.seconds, options.only)
    module, function = PARTS[options.part]
    if options.part == "tests":
        import gpu_tests

        gpu_tests.SHARD = tuple(int(number) for number in options.shard.split("/"))
    left = getattr(import_module(module), function)(rig)
    if left:
        return 3
    failed = [row["row"] for row in rig.rows(options.part) if "error" in row]
    made = {row["row"] for row in rig.rows(options.part) if "error" not in row}
    return int(any(name not in made for name in failed))


if __name__ == "__main__":
    sys.exit(main())
