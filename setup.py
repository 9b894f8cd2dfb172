"""Build fastdg: the Python package always, the compiled extension ``fastdg._C`` where it can be.

FASTDG_BUILD=auto (default) compiles C++, and CUDA where nvcc and a CUDA torch are there, and falls
back to pure Python when something is missing or fails; none, cpp and cuda mean exactly that.
MAX_JOBS and TORCH_CUDA_ARCH_LIST work as for every torch extension. FASTDG_SANITIZE, a list as
-fsanitize takes it, adds the sanitizers that .ci/sanitize runs. Metadata: pyproject.toml.
"""

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from subprocess import run

from setuptools import Command, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NO_TORCH = "torch was not found while building"
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")  # torch 2.10's; runs on all later ones
# No -march: wider vector units are chosen at run time. a*b+c may become one FMA.
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-g0"]
if os.environ.get("FASTDG_SANITIZE"):
    SANITIZE = [f"-fsanitize={os.environ['FASTDG_SANITIZE']}", "-fno-omit-frame-pointer", "-g1"]
else:
    SANITIZE = []
RECORD = "_build.txt"  # read by fastdg/native.py: what was built, or why nothing was


def find_torch() -> str | None:
    """Return the site-packages of the target environment's torch, which build isolation hides."""
    # Isolation works through PYTHONPATH and PYTHONNOUSERSITE; a child started with -E ignores both.
    probe = "import sys; from importlib.util import find_spec; sys.path.pop(0); "
    probe += "spec = find_spec('torch'); print((spec and spec.origin) or '')"
    origin = run([sys.executable, "-E", "-c", probe], capture_output=True, text=True).stdout.strip()
    return str(Path(origin).parents[1]) if origin else None


def compiler_fault() -> str | None:
    """Return why the C++ compiler cannot be used, None if it works and sees Python.h."""
    cxx = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-x", "c++", "-"]
    source = "#include <Python.h>\n#include <atomic>\n"
    try:
        child = run([*cxx.split(), *flags], input=source, capture_output=True, text=True)
    except OSError as error:
        return f"no C++ compiler ({cxx}: {error.strerror})"
    errors = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
    return f"the C++ compiler {cxx} does not work ({errors[0]})" if child.returncode else None


def cuda_fault() -> str | None:
    """Return why CUDA cannot be built for; the build machine need not have a GPU itself."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, library_paths

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").is_file():
        return "nvcc was not found (set CUDA_HOME)"
    if not any(any(Path(path).glob("libcudart.so*")) for path in library_paths("cuda")):
        return f"no libcudart.so under {CUDA_HOME} (set CUDA_HOME)"
    banner = run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in banner:
        return f"torch is built for CUDA {torch.version.cuda}, nvcc is {banner.split()[-1]}"
    return None


def plan(policy: str) -> tuple[str | None, str]:
    """Return what to compile ("cpp", "cuda" or None) and why it is not more than that."""
    if policy not in ("auto", "none", "cpp", "cuda"):
        raise SystemExit(f"FASTDG_BUILD must be auto, none, cpp or cuda; got {policy!r}")
    if policy == "none":
        return None, "FASTDG_BUILD=none"
    if fault := compiler_fault():
        return None, fault
    if find_spec("torch") is None:
        return None, NO_TORCH
    import torch

    if torch.torch_version.TorchVersion(torch.__version__) < (2, 10):
        return None, f"torch {torch.__version__} is older than 2.10"
    if policy == "cpp":
        return "cpp", ""
    if fault := cuda_fault():
        return (None, fault) if policy == "cuda" else ("cpp", f"without CUDA: {fault}")
    return "cuda", ""


def native_extension(cuda: bool):
    """Return the Extension fastdg._C: LibTorch's stable ABI and CPython's, hence one for all."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    return (CUDAExtension if cuda else CppExtension)(
        "fastdg._C",
        sorted(f"csrc/{path.name}" for path in ROOT.glob("csrc/*") if path.suffix in suffixes),
        define_macros=[STABLE_ABI, *([("USE_CUDA", None)] if cuda else ())],
        extra_compile_args={"cxx": [*CXX_FLAGS, *SANITIZE], "nvcc": ["-O3", "-std=c++20"]},
        extra_link_args=SANITIZE,
        py_limited_api=True,
    )


def record(command: Command, outcome: str) -> None:
    """Print the outcome and leave it beside the modules, without an extension of earlier builds."""
    print(f"fastdg: {outcome}", flush=True)
    package = Path(ROOT if command.editable_mode else command.build_lib, "fastdg")
    for stale in package.glob("_C*.so"):
        stale.unlink()
    (package / RECORD).write_text(outcome + "\n")


def commands(policy: str, target: str | None, reason: str) -> dict[str, type]:
    class BuildPython(build_py):
        def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, ...]]:
            modules = super().find_package_modules(package, package_dir)
            if package == "fastdg.kernels":  # see its docstring
                modules += super().find_package_modules(package, "kernels")
            return modules

        def run(self) -> None:
            if target is None and policy in ("cpp", "cuda"):
                raise SystemExit(f"fastdg: FASTDG_BUILD={policy} is impossible here: {reason}")
            super().run()
            record(self, f"{target} {reason}".rstrip() if target else f"not compiled: {reason}")

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
                self.extensions = []  # nothing to copy into place
                record(self, "not compiled: the compiler failed, `pip install -v` shows how")

    return {"build_py": BuildPython, "build_ext": BuildNative}


def main() -> None:
    if find_spec("torch") is None and (site := find_torch()):
        sys.path.append(site)
    policy = os.environ.get("FASTDG_BUILD") or "auto"
    target, reason = plan(policy)
    setup(
        packages=find_packages(include=["fastdg*"]),
        package_data={"fastdg": ["py.typed", RECORD], "fastdg.data": ["numerals.txt"]},
        ext_modules=[native_extension(target == "cuda")] if target else [],
        cmdclass=commands(policy, target, reason),
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if target else {},
        # Fetched only by a front end that isolates the build and whose target has no torch.
        setup_requires=["torch>=2.10"] if reason == NO_TORCH else [],
    )


if __name__ == "__main__":
    main()
