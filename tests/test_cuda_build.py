"""The extension with CUDA as setup.py builds it, beside the oldest and the newest torch, no GPU.

Compiled is all of csrc, with the headers and the `cpp_extension` of torch's CUDA wheel, of which
some 10 MB are read; linked, with the installed CPU torch and a stand-in for its CUDA library.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# The one function that the extension calls of torch's CUDA library
CUDA_LIBRARY = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }"
LOAD = """
import ctypes, sys
for library in sys.argv[1:]:
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
import torch, fastdg
from fastdg.ops.dispatch.registry import OPS
print(fastdg.__file__, fastdg.backends())
print(sorted(name for name, op in OPS.items() if "cuda" in op.backends))
"""


def oldest() -> str:
    """The oldest torch that pyproject.toml claims."""
    found = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return f"{found[1]}.0"


def newest() -> str:
    """The torch that constraints.txt pins."""
    found = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def run(
    *call: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Call Python and wait for its end."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *call], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastdg_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.matrix
@pytest.mark.parametrize("version", [oldest(), newest()])
def test_setup_builds_with_cuda(setup_script: ModuleType, version: str, tmp_path: Path) -> None:
    if fault := setup_script.compiler_fault():
        pytest.skip(fault)
    home, fault = setup_script.find_cuda()
    if home is None:
        pytest.skip(fault)
    wheel, tree, out = tmp_path / "wheel", tmp_path / "tree", tmp_path / "out"
    pytest.importorskip("pip", reason="pip is not installed: no headers of a CUDA torch to be had")
    reading = run(ROOT / "tests/cuda_wheel.py", version, wheel)
    if reading.returncode == 3:
        pytest.skip(reading.stdout.strip())
    assert reading.returncode == 0, reading.stderr
    library = make_libraries(wheel / "torch" / "lib")
    copy_sources(tree)

    banner = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release ([\d.]+)", banner.stdout)
    assert release is not None
    # Said to be for nvcc's CUDA whichever the wheel is for: the headers are the same for all.
    call = (ROOT / "tests/cuda_torch.py", release[1], wheel, "build_wheel('dist')")
    building = run(*call, cwd=tree, FASTDG_BUILD="cuda", TORCH_CUDA_ARCH_LIST="8.0")
    assert building.returncode == 0, building.stdout[-5000:] + building.stderr[-5000:]
    assert len(list(tree.glob("build/**/build.ninja"))) == 1
    (built,) = tree.glob("dist/*-abi3-*.whl")
    zipfile.ZipFile(built).extractall(out)
    assert (out / "fastdg/_build.txt").read_text() == "cuda\n"

    libraries = (setup_script.cudart(home) / "libcudart.so", library)
    loading = run("-W", "error", "-c", LOAD, *libraries, cwd=out, PYTHONPATH=str(out))
    assert loading.returncode == 0, loading.stderr
    assert loading.stdout.startswith(str(out))
    if not torch.cuda.is_available():
        assert "'cuda': (False, 'compiled, but there is no CUDA device')" in loading.stdout
    assert "'cpp': (True, 'cuda')" in loading.stdout
    ops = "['agreement', 'combine', 'combine_rows', 'gram', 'meta_step', 'variance_gap'"
    assert ops in loading.stdout


def make_libraries(folder: Path) -> Path:
    """The installed torch's libraries, and stand-ins for those of CUDA; returns the one called."""
    folder.mkdir()
    for name in ("libc10.so", "libtorch.so", "libtorch_cpu.so"):
        (folder / name).symlink_to(Path(torch.__file__).parent / "lib" / name)
    for name, source in (("libc10_cuda.so", ""), ("libtorch_cuda.so", CUDA_LIBRARY)):
        call = [
            "cc",
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{name}",
            "-x",
            "c",
            "-",
            "-o",
            folder / name,
        ]
        subprocess.run(call, input=source, text=True, check=True)
    return folder / "libtorch_cuda.so"


def copy_sources(tree: Path) -> None:
    """Copy what a build reads."""
    for folder in ("fastdg", "kernels", "csrc"):
        skip = shutil.ignore_patterns("__pycache__", "*.so", "_build.txt")
        shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
