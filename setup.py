"""Build fastdg: the Python package always, the compiled extension ``fastdg._C`` where it can be.

FASTDG_BUILD=auto (default) compiles C++, and CUDA where nvcc and a CUDA torch are there, and falls
back to pure Python when something is missing or fails; none, cpp and cuda mean exactly that.
MAX_JOBS and TORCH_CUDA_ARCH_LIST work as for every torch extension. Metadata: pyproject.toml.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
POLICIES = ("auto", "none", "cpp", "cuda")
NO_TORCH = "torch was not found while building"
RECORD = "_build.txt"  # read by fastdg/native.py: what was built, or why nothing was


def build_policy() -> str:
    value = os.environ.get("FASTDG_BUILD", "auto")
    if value not in POLICIES:
        raise SystemExit(f"FASTDG_BUILD must be one of {', '.join(POLICIES)}; got {value!r}")
    return value


def find_torch() -> str | None:
    """Return the site-packages of the target environment's torch, which build isolation hides.

    Isolation works through PYTHONPATH and PYTHONNOUSERSITE; a child started with -E ignores them.
    """
    probe = (
        "import sys, importlib.util; sys.path.pop(0); "
        "spec = importlib.util.find_spec('torch'); print((spec and spec.origin) or '')"
    )
    child = subprocess.run([sys.executable, "-E", "-c", probe], capture_output=True, text=True)
    return str(Path(child.stdout.strip()).parents[1]) if child.stdout.strip() else None


def compiler_fault() -> str | None:
    """Return why the C++ compiler cannot be used, None if it works and sees Python.h."""
    cxx = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-x", "c++", "-"]
    source = "#include <Python.h>\n#include <atomic>\n"
    try:
        run = subprocess.run([*cxx.split(), *flags], input=source, capture_output=True, text=True)
    except OSError as error:
        return f"no C++ compiler ({cxx}: {error.strerror})"
    errors = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
    return f"the C++ compiler {cxx} does not work ({errors[0]})" if run.returncode else None


def cuda_fault() -> str | None:
    """Return why CUDA cannot be built for; the build machine need not have a GPU itself."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if not CUDA_HOME or not nvcc.is_file():
        return "nvcc was not found (set CUDA_HOME)"
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", banner)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"torch is built for CUDA {torch.version.cuda}, {nvcc} is another: {banner[-90:]!r}"
    return None


def plan(policy: str) -> tuple[str | None, str]:
    """Return what to compile ("cpp", "cuda" or None) and why it is not more than that."""
    if policy == "none":
        return None, "FASTDG_BUILD=none"
    if not any(ROOT.glob("csrc/*.cpp")):
        return None, "this source tree has no csrc/*.cpp"
    if fault := compiler_fault():
        return None, fault
    if importlib.util.find_spec("torch") is None:
        return None, NO_TORCH
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return None, f"torch {torch.__version__} is older than 2.10"
    if policy == "cpp":
        return "cpp", ""
    if fault := cuda_fault():
        return (None, fault) if policy == "cuda" else ("cpp", f"without CUDA: {fault}")
    return "cuda", ""


def native_extension(cuda: bool):
    """Return the Extension fastdg._C: LibTorch's stable ABI and CPython's, hence one for all."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = [*ROOT.glob("csrc/*.cpp"), *(ROOT.glob("csrc/*.cu") if cuda else ())]
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000"), *([("USE_CUDA", None)] * cuda)]
    return (CUDAExtension if cuda else CppExtension)(
        "fastdg._C",
        sorted(str(path.relative_to(ROOT)) for path in sources),
        define_macros=macros,
        # a*b+c may become one FMA; no -march: vector units are chosen at run time in the sources.
        extra_compile_args={
            "cxx": ["-O3", "-std=c++20", "-ffp-contract=fast", "-g0"],
            "nvcc": ["-O3", "-std=c++20"],
        },
        py_limited_api=True,
    )


def record(outcome: str, *folders: Path) -> None:
    print(f"fastdg: {outcome}", flush=True)
    for folder in folders:
        (folder / RECORD).write_text(outcome + "\n")


def commands(policy: str, target: str | None, reason: str) -> dict[str, type]:
    """Return the setuptools commands that build as planned and leave a record of it."""

    class BuildPython(build_py):
        def run(self) -> None:
            if target is None and policy in ("cpp", "cuda"):
                raise SystemExit(f"fastdg: FASTDG_BUILD={policy} is impossible here: {reason}")
            outcome = f"{target} {reason}".rstrip() if target else f"not compiled: {reason}"
            record(outcome, ROOT / "fastdg")
            for stale in ROOT.glob("fastdg/_C*.so"):  # of an earlier in-place build
                stale.unlink()
            super().run()

    if target is None:
        return {"build_py": BuildPython}
    from torch.utils.cpp_extension import BuildExtension

    class BuildNative(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if policy != "auto":
                    raise
                print(error, file=sys.stderr)
                self.extensions = []  # so that nothing is copied into place
                built = Path(self.build_lib, "fastdg")
                folders = [ROOT / "fastdg", *([built] if built.is_dir() else [])]
                record("not compiled: the compiler failed, pip install -v shows how", *folders)

    return {"build_py": BuildPython, "build_ext": BuildNative}


def main() -> None:
    policy = build_policy()
    if importlib.util.find_spec("torch") is None and (site := find_torch()):
        sys.path.append(site)
    target, reason = plan(policy)
    setup(
        packages=[*find_packages(include=["fastdg*"]), "fastdg.kernels"],
        package_dir={"fastdg.kernels": "kernels"},
        package_data={"fastdg": ["py.typed", RECORD]},
        ext_modules=[native_extension(target == "cuda")] if target else [],
        cmdclass=commands(policy, target, reason),
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if target else {},
        # Fetched only by a front end that isolates the build and whose target has no torch.
        setup_requires=["torch>=2.10"] if reason == NO_TORCH else [],
    )


if __name__ == "__main__":
    main()
