"""Builds that fail: what is built all the same, and where it is said."""

import importlib.util
import os
import pty
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

import fastdg
from fastdg import native
from fastdg.cli.app import app
from fastdg.ops.dispatch import backends

ROOT = Path(__file__).resolve().parent.parent
ERROR = "csrc/kernel.cu(7): error: [bold]this is no CUDA"
NVCC = f"""#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;; esac
echo "{ERROR}" >&2
exit 2
"""


@pytest.fixture
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastdg_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(setup_script: ModuleType, tmp_path: Path) -> Path:
    """A package of few sources, to build."""
    if fault := setup_script.compiler_fault():
        pytest.skip(fault)
    tree = tmp_path / "tree"
    (tree / "csrc").mkdir(parents=True)
    for folder in ("fastdg", "kernels"):
        skip = shutil.ignore_patterns("__pycache__", "*.so", "_build.txt")
        shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/module.cpp"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def make_toolkit(home: Path, nvcc: str = NVCC) -> Path:
    """What passes for a CUDA toolkit."""
    for name, text in (
        ("bin/nvcc", nvcc),
        ("include/cuda_runtime.h", ""),
        ("lib/libcudart.so", ""),
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (home / "bin/nvcc").chmod(0o755)
    return home


def build(tree: Path, *call: str | Path, **environment: str) -> tuple[int, str, str, set[str]]:
    """Exit status, output, record and compiled files of a build in ``tree``."""
    shutil.rmtree(tree / "dist", ignore_errors=True)
    shutil.rmtree(tree / "build", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, *call],
        cwd=tree,
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": "8.0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    record, compiled = "", set()
    for wheel in tree.glob("dist/*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            record = archive.read("fastdg/_build.txt").decode()
            compiled = {name for name in archive.namelist() if name.endswith(".so")}
    return done.returncode, done.stdout, record, compiled


CPU = ("-c", "from setuptools import build_meta; build_meta.build_wheel('dist')")
CUDA = (ROOT / "tests/cuda_torch.py", "13.0", "-", "build_wheel('dist')")


def test_a_failed_compiler_leaves_plain_python(tree: Path) -> None:
    (tree / "csrc" / "broken.cpp").write_text("this is not C++\n")
    status, output, record, compiled = build(tree, *CPU, FASTDG_BUILD="auto")
    assert status == 0 and not compiled
    first, *errors = record.splitlines()
    assert first == "not compiled: the compiler failed"
    assert "broken.cpp:1:1: error: " in errors[0]
    assert f"fastdg: {record}" in output

    status, output, _, compiled = build(tree, *CPU, FASTDG_BUILD="cpp")
    assert status != 0 and not compiled
    assert "fastdg: FASTDG_BUILD=cpp failed\n    " in output
    assert "broken.cpp:1:1: error: " in output.split("FASTDG_BUILD=cpp failed")[1]


@pytest.mark.matrix
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "without ninja"])
def test_a_failed_nvcc_leaves_the_cpp_ops(tree: Path, tmp_path: Path, ninja: bool) -> None:
    (tree / "csrc" / "kernel.cu").write_text("#include <cuda_runtime.h>\n")
    environment = {"CUDA_HOME": str(make_toolkit(tmp_path / "cuda"))}
    if not ninja:
        (tmp_path / "ninja").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "ninja").chmod(0o755)
        environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    status, output, record, compiled = build(tree, *CUDA, FASTDG_BUILD="auto", **environment)
    assert status == 0, output
    assert compiled == {"fastdg/_C.abi3.so"}
    assert record == f"cpp without CUDA: the build of the CUDA ops failed\n    {ERROR}\n"
    assert f"fastdg: {record}" in output
    if not ninja:
        return
    status, output, _, compiled = build(tree, *CUDA, FASTDG_BUILD="cuda", **environment)
    assert status != 0 and not compiled
    assert f"fastdg: FASTDG_BUILD=cuda failed\n    {ERROR}" in output

    status, output, record, compiled = build(tree, *CUDA, FASTDG_BUILD="cpp", **environment)
    assert status == 0 and compiled == {"fastdg/_C.abi3.so"}
    assert record == "cpp without CUDA: FASTDG_BUILD=cpp\n"


@pytest.mark.matrix
def test_both_compilers_may_fail(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc" / "kernel.cu").write_text("#include <cuda_runtime.h>\n")
    (tree / "csrc" / "broken.cpp").write_text("this is not C++\n")
    home = make_toolkit(tmp_path / "cuda")
    status, _, record, compiled = build(tree, *CUDA, FASTDG_BUILD="auto", CUDA_HOME=str(home))
    assert status == 0 and not compiled
    assert record.startswith("not compiled: the compiler failed\n    ")
    assert "broken.cpp:1:1: error: " in record


@pytest.mark.matrix
def test_pip_that_prints_nothing_leaves_the_errors_on_the_terminal(
    tree: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pip", reason="pip is not installed")
    (tree / "csrc" / "broken.cpp").write_text("this is not C++\n")
    call = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    call += ["--no-index", "--target", str(tmp_path / "target"), str(tree)]
    os.environ.pop("FASTDG_BUILD", None)
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, call)
    shown = b""
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # the last one has closed it
            break
        if not data:
            break
        shown += data
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert status == 0, shown.decode()
    assert "fastdg: not compiled: the compiler failed" in shown.decode()
    assert "broken.cpp:1:1: error: " in shown.decode()


# -- what is said at import, and by `fastdg info` --


@pytest.fixture
def failed_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not native.status()[0]:
        pytest.skip(native.status()[1])
    file = tmp_path / "_build.txt"
    file.write_text(f"cpp without CUDA: the build of the CUDA ops failed\n    {ERROR}\n")
    monkeypatch.setattr(native, "_RECORD", file)
    outcome = native.status.__wrapped__()
    monkeypatch.setattr(native, "status", lambda: outcome)
    for op in fastdg.ops.dispatch.registry.OPS.values():  # as there is none where that failed
        monkeypatch.setattr(op, "backends", {k: v for k, v in op.backends.items() if k != "cuda"})
    monkeypatch.delenv("FASTDG_BACKEND", raising=False)
    return file


def test_import_warns_once_of_a_failed_build(
    failed_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backends._attach_native()
    assert [warning.category for warning in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert "the compiled CUDA ops are not available (not compiled: the build of the" in message
    assert ERROR in message and "Install fastdg again" in message

    monkeypatch.setenv("FASTDG_BACKEND", "reference")
    backends._attach_native()


def test_an_extension_built_from_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native.status()[0]:
        pytest.skip(native.status()[1])
    file = tmp_path / "_sources.txt"
    monkeypatch.setattr(native, "_SOURCES", file)
    assert native.status.__wrapped__()[0]  # as an install's, which has no sources to compare
    file.write_text(native.sources_digest())
    assert native.status.__wrapped__()[0]
    file.write_text("0123456789abcdef")
    outcome = native.status.__wrapped__()
    assert outcome[0] is False
    monkeypatch.setattr(native, "status", lambda: outcome)
    monkeypatch.delenv("FASTDG_BACKEND", raising=False)
    with pytest.warns(RuntimeWarning, match=r"built from other sources than csrc/.*pip install"):
        backends._attach_native()


def test_setup_and_package_agree_on_the_sources(setup_script: ModuleType) -> None:
    assert setup_script.sources_digest() == native.sources_digest()


def test_info_shows_the_errors_of_a_failed_build(
    failed_record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert ERROR in result.output
    available, reason = fastdg.backends()["cuda"]
    assert not available and reason.startswith("not compiled: the build of the CUDA ops failed\n")
    with pytest.raises(RuntimeError, match=r"(?s)backend 'cuda' is not available: .*no CUDA"):
        fastdg.use_backend("cuda").__enter__()


# -- the CUDA toolkit --


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_toolkit_of_a_linked_nvcc(
    setup_script: ModuleType, no_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_toolkit(tmp_path / "cuda-13.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    assert setup_script.find_cuda() == (home, "")


def test_the_toolkit_of_a_script_that_calls_nvcc(
    setup_script: ModuleType, no_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "cuda-13.0"
    make_toolkit(
        home, f'#!/bin/sh\necho "#$ _HERE_={home}/bin" >&2\necho "#$ TOP={home}/bin/.." >&2\n'
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    assert setup_script.find_cuda() == (home, "")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_toolkit_of_this_machine_is_whole(setup_script: ModuleType, no_cuda: None) -> None:
    home, fault = setup_script.find_cuda()
    assert home is not None, fault
    assert any(home.glob("**/include/cuda_runtime.h"))
    assert setup_script.cudart(home) is not None


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h", "lib/libcudart.so"])
def test_a_named_toolkit_is_taken_or_said_to_lack_a_piece(
    setup_script: ModuleType,
    no_cuda: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    missing: str,
) -> None:
    home = make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv(variable, str(home))
    assert setup_script.find_cuda() == (home, "")
    (home / missing).unlink()
    found, fault = setup_script.find_cuda()
    assert found is None
    piece = missing.removeprefix("lib/")
    assert fault == f"no CUDA toolkit was found: {home} has no {piece} (set CUDA_HOME)"


@pytest.mark.parametrize(
    ("nvcc", "fault"),
    [
        ("#!/bin/sh\necho 'nvcc fatal: why' >&2; exit 1\n", r"does not work \(nvcc fatal: why\)"),
        ("#!/bin/sh\nexit 3\n", r"does not work \(exit status 3\)"),
        ("#!/no/such/shell\n", r"does not work \(No such file"),
        ("#!/bin/sh\necho release 11.8, V11\n", "built for CUDA 13.0, nvcc is of release 11.8"),
    ],
)
def test_an_nvcc_that_does_not_serve_is_said(
    setup_script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nvcc: str,
    fault: str,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda", nvcc)))
    if found := setup_script.compiler_fault():
        pytest.skip(found)
    assert setup_script.plan("cuda")[0] is None
    target, reason = setup_script.plan("auto")
    assert target == "cpp" and reason.startswith("without CUDA: ")
    assert re.search(fault, reason), reason
