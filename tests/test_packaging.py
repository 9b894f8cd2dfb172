"""What is built, what is shipped, and what happens on machines that lack something."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastdg import native

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = sorted(ROOT.glob("csrc/*.cu"))
NOT_SHIPPED = shutil.ignore_patterns(
    "__pycache__", "*.so", "_build.txt", "_sources.*", "*.egg-info"
)


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastdg_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_sources(target: Path) -> Path:
    """Copy what a clone holds, without builds."""
    for folder in ("fastdg", "kernels", "csrc", "tests", "benchmarks"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, target / folder, ignore=NOT_SHIPPED)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, target)
    return target


def build(tree: Path, call: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one hook of the build backend, as pip does, in ``tree``."""
    script = f"from setuptools import build_meta; print(build_meta.{call})"
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """File names in the sdist, and in the pure wheel that the unpacked sdist builds."""
    tree = copy_sources(tmp_path_factory.mktemp("tree"))
    packing = build(tree, "build_sdist('dist')", FASTDG_BUILD="none")
    assert packing.returncode == 0, packing.stderr
    (sdist,) = tree.glob("dist/*.tar.gz")
    unpacked = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        # Patch releases of Python before 2023 know no filter
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(unpacked, **safe)
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    (root,) = unpacked.iterdir()
    building = build(root, "build_wheel('dist')", FASTDG_BUILD="none")
    assert building.returncode == 0, building.stderr
    (wheel,) = root.glob("dist/*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    return packed, set(zipfile.ZipFile(wheel).namelist())


def python_files(folder: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"{folder}/**/*.py")}


def test_wheel_ships_the_package_and_nothing_else(distributions: tuple[set[str], set[str]]) -> None:
    _, wheel = distributions
    expected = python_files("fastdg") | {f"fastdg/{name}" for name in python_files("kernels")}
    expected |= {"fastdg/py.typed", "fastdg/_build.txt", "fastdg/studies/data/numerals.txt"}
    assert expected == {name for name in wheel if ".dist-info/" not in name}


def test_sdist_can_build_and_test_itself(distributions: tuple[set[str], set[str]]) -> None:
    sdist, _ = distributions
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*.*")}
    files = {"setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert sources | files | python_files("kernels") | python_files("tests") <= sdist
    assert not [name for name in sdist if name.endswith((".so", "_build.txt", "_sources.txt"))]


IMPORTED = """
import sys, torch
before = set(sys.modules)
import fastdg
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the Triton kernels are imported")
def test_import_brings_nothing_but_the_package() -> None:
    """What takes long to import (compilers of torch, triton, matplotlib) waits until it is used."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    brought = set(done.stdout.split())
    others = {name.partition(".")[0] for name in brought} - {"fastdg"} - sys.stdlib_module_names
    assert not others
    heavy = ("fastdg.studies", "fastdg.cli", "fastdg.domainbed", "fastdg.examples")
    assert not [name for name in brought if name.startswith((*heavy, "fastdg.kernels."))]


PROBE = """
import importlib.util, sys
spec = importlib.util.find_spec("kernels")
try:
    from kernels import get_kernel
except ImportError:
    get_kernel = None
print(spec and spec.origin, get_kernel)
"""


@pytest.mark.parametrize("way", ["-c", "-m", "script"])
@pytest.mark.parametrize("installed", [False, True])
def test_kernels_in_a_clones_root_hide_no_package(
    tmp_path: Path, way: str, installed: bool
) -> None:
    """transformers and others look for a package of that name, and take whatever they find."""
    if not installed and (found := importlib.util.find_spec("kernels")) and found.origin:
        pytest.skip(f"a package kernels is installed at {found.origin}")
    (tmp_path / "probe.py").write_text(PROBE)
    root = ROOT
    if way == "script":  # Python puts its folder on the path
        root = tmp_path / "clone"
        shutil.copytree(ROOT / "kernels", root / "kernels", ignore=NOT_SHIPPED)
        (root / "probe.py").write_text(PROBE)
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'")
    arguments = {"-c": ["-c", PROBE], "-m": ["-m", "probe"], "script": ["probe.py"]}[way]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = f"{tmp_path / 'kernels' / '__init__.py'} theirs"
    assert done.stdout.strip() == (theirs if installed else "None None")


def test_installed_kernels_are_beside_their_package(tmp_path: Path) -> None:
    """And not those of a package ``kernels`` in the same site-packages."""
    pytest.importorskip("triton", reason="triton is not installed: fastdg.kernels needs it")
    for source, target in (("fastdg", "fastdg"), ("kernels", "fastdg/kernels")):
        folder = tmp_path / target
        shutil.copytree(ROOT / source, folder, ignore=NOT_SHIPPED, dirs_exist_ok=True)
    (tmp_path / "kernels").mkdir()
    code = "from fastdg import kernels as k; from fastdg.kernels import launch\n"
    code += "print(*k.__path__, launch.__file__, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "fastdg" / "kernels"
    assert done.stdout.splitlines() == [str(folder), str(folder / "launch.py")]


def test_transformers_starts_in_a_clones_root() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = "import transformers.integrations.hub_kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["CPP", "gpu"])
def test_unknown_build_policy_is_refused(setup_script: ModuleType, value: str) -> None:
    with pytest.raises(SystemExit, match=r"^FASTDG_BUILD "):
        setup_script.plan(value)


def test_empty_build_policy_is_auto(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def plan(policy: str) -> None:
        seen.append(policy)
        raise SystemExit

    monkeypatch.setattr(setup_script, "plan", plan)
    monkeypatch.setenv("FASTDG_BUILD", "")
    with pytest.raises(SystemExit):
        setup_script.main()
    assert seen == ["auto"]


def test_build_none_compiles_nothing(setup_script: ModuleType) -> None:
    assert setup_script.plan("none") == (None, "FASTDG_BUILD=none")


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_auto_goes_on_without_a_compiler(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    target, reason = setup_script.plan("auto")
    assert target is None
    assert compiler in reason


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA here")
def test_cuda_on_a_cpu_torch_says_why_not(setup_script: ModuleType) -> None:
    if fault := setup_script.compiler_fault():
        pytest.skip(fault)
    target, reason = setup_script.plan("cuda")
    assert target is None
    assert "built without CUDA" in reason
    assert setup_script.plan("auto")[0] == "cpp"


def test_torch_is_found_through_build_isolation(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()  # what isolation puts first must not be taken
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert setup_script.find_torch() == str(Path(torch.__file__).parents[1])


def test_no_torch_is_found_where_there_is_none(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "empty" / "bin" / "python"))
    assert setup_script.find_torch() is None


def test_no_two_sources_make_one_object() -> None:
    """An object file has the name of its source without the suffix."""
    stems = [path.stem for path in ROOT.glob("csrc/*") if path.suffix in (".cpp", ".cu")]
    assert len(stems) > 10
    assert sorted(set(stems)) == sorted(stems)


@pytest.mark.matrix
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_compile_beside_any_torch(
    setup_script: ModuleType, source: Path, tmp_path: Path
) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH: CUDA sources cannot be compiled here")
    from torch.utils.cpp_extension import include_paths

    flags = ["-std=c++20", "-DUSE_CUDA", "-D{}={}".format(*setup_script.STABLE_ABI)]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    includes = [f"-I{path}" for path in include_paths()]
    command = [nvcc, "-c", *targets, *flags, *includes, str(source), "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_extension_keeps_to_the_stable_abi() -> None:
    available, reason = native.status()
    if not available:
        pytest.skip(reason)
    if shutil.which("nm") is None:
        pytest.skip("nm is not on PATH: the symbols of the extension cannot be listed")
    (library,) = native._PACKAGE.glob("_C*.so")
    listed = ["nm", "--dynamic", "--undefined-only", "--demangle", str(library)]
    symbols = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    unstable = re.findall(r"\b(?:at|c10|torch|caffe2)::\S+", symbols)
    assert not unstable, "another torch may lack these"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package folder for the loader to look at."""
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native, "_RECORD", tmp_path / "_build.txt")
    monkeypatch.setattr(native, "_SOURCES", tmp_path / "_sources.txt")
    return tmp_path


def test_status_names_the_way_to_build(package: Path) -> None:
    available, reason = native.status.__wrapped__()
    assert not available
    assert "pip install -v -e ." in reason


def test_status_repeats_why_nothing_was_built(package: Path) -> None:
    (package / "_build.txt").write_text("not compiled: FASTDG_BUILD=none\n")
    assert native.status.__wrapped__() == (False, "not compiled: FASTDG_BUILD=none")


def test_status_of_a_broken_library_quotes_the_loader(package: Path) -> None:
    (package / "_C.abi3.so").write_text("not a library")
    available, reason = native.status.__wrapped__()
    assert not available
    assert reason.startswith("_C.abi3.so does not load: ")


def test_status_on_an_old_torch_names_both_versions(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "_C.abi3.so").touch()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert native.status.__wrapped__() == (
        False,
        "built for torch >= 2.10, found 2.9.1+cpu: upgrade torch",
    )


def test_every_requirement_has_a_tested_version() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    named = {
        match[0]
        for line in metadata.requires("fastdg") or ()
        if (match := re.match(r"[\w-]+", line))
    }
    assert named - {"fastdg"} <= pinned


def test_readme_has_one_command_for_the_demo_and_one_for_the_tests() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    last = [command.rsplit(" && ", 1)[1] for command in commands]
    assert last == ["fastdg demo", "pytest -n auto"]
    assert all(command.count("-c constraints.txt") == 2 for command in commands)
