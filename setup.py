"""Build fastdg: the Python package always, the compiled extension ``fastdg._C`` where it can be.

FASTDG_BUILD=auto (default) compiles C++, and CUDA where nvcc and a CUDA torch are there. If CUDA
fails it compiles C++ alone, if that fails too nothing, and says so; none, cpp and cuda mean exactly
that. MAX_JOBS and TORCH_CUDA_ARCH_LIST work as for every torch extension. FASTDG_SANITIZE, a list
as -fsanitize takes it, adds the sanitizers that .ci/sanitize runs. Metadata: pyproject.toml.
"""

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, run
from threading import Thread

from setuptools import Command, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NO_TORCH = "torch was not found while building"
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")  # torch 2.10's; runs on all later ones
# No -march: wider vector units are chosen at run time. a*b+c may become one FMA.
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-g0"]
if os.environ.get("FASTDG_SANITIZE"):
    # -O1, as the sanitizers' authors advise: with -O3 the compiler takes many times as long
    SANITIZE = [f"-fsanitize={os.environ['FASTDG_SANITIZE']}", "-fno-omit-frame-pointer"]
    SANITIZE += ["-O1", "-g1"]
else:
    SANITIZE = []
RECORD = "_build.txt"  # read by fastdg/native.py: the outcome, and the compiler's errors below it
SOURCES = "_sources.txt"  # of an editable install, read there too: a digest of the compiled sources

ERROR = re.compile(
    r"(?<![-\w])(?:error|fatal)\b|undefined reference|cannot find -l|not found|killed", re.I
)
# Command lines, and ninja's words about a command that failed
NO_ERROR = re.compile(r"^\[\d+/\d+\]|^FAILED:|^ninja: build stopped| -c | -shared |^\s*$")


def find_torch() -> str | None:
    """Return the site-packages of the target environment's torch, which build isolation hides."""
    # Isolation works through PYTHONPATH and PYTHONNOUSERSITE; a child started with -E ignores both.
    probe = "import sys; from importlib.util import find_spec; sys.path.pop(0); "
    probe += "spec = find_spec('torch'); print((spec and spec.origin) or '')"
    origin = run([sys.executable, "-E", "-c", probe], stdout=PIPE, text=True).stdout.strip()
    return str(Path(origin).parents[1]) if origin else None


def error_lines(output: str, most: int = 5) -> list[str]:
    """Return the first errors in a compiler's output, or its last lines if it calls none so."""
    lines = [line.rstrip()[:300] for line in output.splitlines() if not NO_ERROR.search(line)]
    return [line for line in lines if ERROR.search(line)][:most] or lines[-most:]


def compiler_fault() -> str | None:
    """Return why the C++ compiler cannot be used, None if it works and sees Python.h."""
    cxx = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-x", "c++", "-"]
    source = "#include <Python.h>\n#include <atomic>\n"
    try:
        child = run([*cxx.split(), *flags], input=source, capture_output=True, text=True)
    except OSError as error:
        return f"no C++ compiler ({cxx}: {error.strerror})"
    errors = error_lines(child.stderr, 1) or [f"exit status {child.returncode}"]
    return f"the C++ compiler {cxx} does not work ({errors[0]})" if child.returncode else None


def cuda_folders() -> Iterator[Path]:
    """Yield where the CUDA toolkit may be: the named folder only, else nvcc's, else the usual."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        yield Path(named)
        return
    if nvcc := shutil.which("nvcc"):
        # The nvcc on PATH may be a link, or a script that calls the one of the toolkit: a dry run
        # tells where that lies.
        with suppress(OSError):
            call = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
            if top := re.search(r"^#\$ TOP=(.+)$", run(call, stderr=PIPE, text=True).stderr, re.M):
                yield Path(os.path.normpath(top[1].strip()))
        yield Path(nvcc).resolve().parents[1]
        yield Path(nvcc).parents[1]
    yield from (Path("/usr/local/cuda"), Path("/opt/cuda"))


def cudart(home: Path) -> Path | None:
    """Return the folder of libcudart.so, which the extension is linked to."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or "."
    folders = [home / "lib64", home / "lib", home / "lib" / multiarch, *home.glob("targets/*/lib")]
    return next((folder for folder in folders if (folder / "libcudart.so").exists()), None)


def toolkit_fault(home: Path) -> str | None:
    """Return the piece of a CUDA toolkit that ``home`` lacks."""
    if not (home / "bin" / "nvcc").is_file():
        return f"{home} has no bin/nvcc"
    if not any(home.glob("include/cuda_runtime.h")) and not any(
        home.glob("targets/*/include/cuda_runtime.h")
    ):
        return f"{home} has no include/cuda_runtime.h"
    return f"{home} has no libcudart.so" if cudart(home) is None else None


def find_cuda() -> tuple[Path | None, str]:
    """Return the first folder that holds a CUDA toolkit, or why none does."""
    faults = []
    for home in cuda_folders():
        if (fault := toolkit_fault(home)) is None:
            return home, ""
        faults.append(fault)
    # A folder with nvcc that lacks another piece tells more than one without.
    fault = min(faults, key=lambda fault: fault.endswith("bin/nvcc"))
    return None, f"no CUDA toolkit was found: {fault} (set CUDA_HOME)"


def cuda_fault() -> str | None:
    """Return why CUDA cannot be built for; the build machine need not have a GPU itself."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home, fault = find_cuda()
    if home is None:
        return fault
    try:
        child = run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    except OSError as error:
        return f"{home}/bin/nvcc does not work ({error.strerror})"
    if (release := re.search(r"release (\d+)\.\d+", child.stdout)) is None:
        said = error_lines(child.stderr + child.stdout, 1) or [f"exit status {child.returncode}"]
        return f"{home}/bin/nvcc does not work ({said[0]})"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"torch is built for CUDA {torch.version.cuda}, nvcc is of {release[0]}"
    os.environ["CUDA_HOME"] = str(home)  # read by torch.utils.cpp_extension when it is imported
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
        return "cpp", "without CUDA: FASTDG_BUILD=cpp"
    if fault := cuda_fault():
        return (None, fault) if policy == "cuda" else ("cpp", f"without CUDA: {fault}")
    return "cuda", ""


def native_extension(cuda: bool):
    """Return the Extension fastdg._C: LibTorch's stable ABI and CPython's, hence one for all."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    extension = (CUDAExtension if cuda else CppExtension)(
        "fastdg._C",
        sorted(f"csrc/{path.name}" for path in ROOT.glob("csrc/*") if path.suffix in suffixes),
        define_macros=[STABLE_ABI, *([("USE_CUDA", None)] if cuda else ())],
        extra_compile_args={"cxx": [*CXX_FLAGS, *SANITIZE], "nvcc": ["-O3", "-std=c++20"]},
        extra_link_args=SANITIZE,
        py_limited_api=True,
    )
    if cuda:
        extension.library_dirs.append(str(cudart(Path(os.environ["CUDA_HOME"]))))
    return extension


def sources_digest() -> str:
    """Return a digest of csrc/, by which an editable install sees that it has to be built again."""
    files = sorted((ROOT / "csrc").glob("*.[ch]*"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def record(command: Command, outcome: str, errors: list[str] = []) -> None:  # noqa: B006
    """Print the outcome and leave it beside the modules, without an extension of earlier builds."""
    text = "\n    ".join([outcome, *errors])
    print(f"fastdg: {text}", flush=True)
    package = Path(ROOT if command.editable_mode else command.build_lib, "fastdg")
    for stale in package.glob("_C*.so"):
        stale.unlink()
    (package / RECORD).write_text(text + "\n")
    (package / SOURCES).unlink(missing_ok=True)
    if command.editable_mode and not outcome.startswith("not compiled"):
        (package / SOURCES).write_text(sources_digest())
    if errors and not os.isatty(1):
        # pip shows the output of a build only if that fails, and this one goes on without the
        # extension: say so on the terminal, if there is one.
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\nfastdg: {text}\n    (`pip install -v` shows all of it)\n")


@contextmanager
def copied_output() -> Iterator[list[bytes]]:
    """Give what this process and the compilers print meanwhile, which is printed all the same."""
    kept: list[bytes] = []
    sys.stdout.flush(), sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    source, sink = os.pipe()

    def copy() -> None:
        while data := os.read(source, 1 << 16):
            kept.append(data)
            os.write(saved[0], data)

    thread = Thread(target=copy)
    thread.start()
    os.dup2(sink, 1), os.dup2(sink, 2)
    os.close(sink)
    try:
        yield kept
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(saved[0], 1), os.dup2(saved[1], 2)  # the last writers of the pipe end here
        thread.join()
        for descriptor in (*saved, source):
            os.close(descriptor)


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
            if not (errors := self.attempt()):
                return
            if target == "cuda":
                record(self, "cpp without CUDA: the build of the CUDA ops failed", errors)
                vars(self.extensions[0]).update(vars(native_extension(cuda=False)))
                errors = self.attempt()
            if errors:
                self.extensions = []  # nothing to copy into place
                record(self, "not compiled: the compiler failed", errors)

        def attempt(self) -> list[str]:
            """Compile and link; return the errors, or raise them where the policy wants no less."""
            with copied_output() as output:
                try:
                    super().build_extensions()
                    return []
                except Exception as error:
                    fault = error
            print(fault, file=sys.stderr)
            errors = error_lines(b"".join(output).decode(errors="replace"))
            if policy != "auto":
                said = "\n    ".join([f"fastdg: FASTDG_BUILD={policy} failed", *errors])
                raise SystemExit(said) from fault
            return errors or [f"{type(fault).__name__}: {fault}"]

    return {"build_py": BuildPython, "build_ext": BuildNative}


def main() -> None:
    if find_spec("torch") is None and (site := find_torch()):
        sys.path.append(site)
    policy = os.environ.get("FASTDG_BUILD") or "auto"
    target, reason = plan(policy)
    setup(
        packages=find_packages(include=["fastdg*"]),
        package_data={"fastdg": ["py.typed", RECORD], "fastdg.studies.data": ["numerals.txt"]},
        ext_modules=[native_extension(target == "cuda")] if target else [],
        cmdclass=commands(policy, target, reason),
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if target else {},
        # Fetched only by a front end that isolates the build and whose target has no torch.
        setup_requires=["torch>=2.10"] if reason == NO_TORCH else [],
    )


if __name__ == "__main__":
    main()
