"""Build the extension where it runs, and say what was built, with which versions, for which
device."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from gpu_rig import Rig, Row

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fastdg", "kernels", "csrc")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
PACKAGES = ("torch", "triton", "torchvision", "timm", "torchjd", "opacus", "numpy", "pytest")
LOOK = "import json, fastdg; print(json.dumps(fastdg.backends()))"


def versions() -> dict[str, str]:
    here = {d.metadata["Name"].lower(): d.version for d in distributions()}
    found = {name: here.get(name, "not installed") for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def device(name: str) -> Row:
    if name != "cuda":
        return {"name": platform.processor() or platform.machine(), "threads": os.cpu_count()}
    found = torch.cuda.get_device_properties(0)
    wanted = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size")
    return {key: getattr(found, key) for key in wanted if hasattr(found, key)}


def install(rig: Rig) -> Row:
    """``FASTDG_BUILD=cuda`` in place, without network and isolation. A rehearsal builds a copy of
    the sources, without a compiler, into a folder of its own."""
    environment = {**os.environ, "FASTDG_BUILD": "none" if rig.small else "cuda"}
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        tree, site = ROOT, None
        if rig.small:
            tree, site = Path(folder, "tree"), Path(folder, "site")
            for name in SOURCES:
                skip = shutil.ignore_patterns("__pycache__", "*.so", "_build.txt", "_sources.txt")
                shutil.copytree(ROOT / name, tree / name, ignore=skip)
            for name in FILES:
                shutil.copy(ROOT / name, tree)
            command += ["--target", str(site), "."]
        else:
            major, minor = torch.cuda.get_device_capability()
            environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
            command += ["-e", "."]
        child = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        rig.out.mkdir(parents=True, exist_ok=True)
        (rig.out / "build.log").write_text(child.stdout + child.stderr)
        if child.returncode:
            raise RuntimeError((child.stdout + child.stderr)[-1500:])
        made = (site or tree) / "fastdg" / "_build.txt"
        return {"build": made.read_text().strip(), "backends": backends(site)}


def backends(site: Path | None) -> Any:
    """The backends of a fresh process, with the build from ``site``."""
    environment = {**os.environ, **({"PYTHONPATH": str(site)} if site else {})}
    child = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=site or ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(child.stdout)


def run(rig: Rig) -> int:
    todo = {"versions": versions, "device": partial(device, rig.device)}
    return rig.fill("build", {**todo, "build": partial(install, rig)})
