"""Find and load the compiled extension, and say in words why it is not there.

The extension holds no Python objects: loading it attaches C++ and CUDA implementations to the ops
that Python has defined. Without it every op runs its plain-PyTorch reference.
"""

import re
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent
_RECORD = _PACKAGE / "_build.txt"  # written by setup.py: the outcome, or why nothing was compiled
_SOURCES = _PACKAGE / "_sources.txt"  # of an editable install: a digest of the compiled sources
_NOT_INSTALLED = (
    "not compiled: no fastdg/_C*.so beside the package; `pip install -v -e .` with a C++ compiler "
    "builds it and shows what fails"
)


def load() -> None:
    """Load the compiled extension if it is there; never raises, see ``status()``."""
    status()


def _record() -> list[str]:
    """Return the lines that setup.py left: the outcome, and the compiler's errors if it failed."""
    return _RECORD.read_text().strip().splitlines() if _RECORD.is_file() else []


def sources_digest() -> str:
    """Return a digest of csrc/ as it is now; setup.py writes the same when it compiles."""
    files = sorted((_PACKAGE.parent / "csrc").glob("*.[ch]*"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def failed() -> bool:
    """Return whether the install tried to compile more than it could."""
    return len(_record()) > 1


def without_cuda() -> str:
    """Return why the compiled extension has no CUDA ops."""
    available, reason = status()
    if not available:
        return reason
    _, found, why = reason.partition("without CUDA: ")
    return f"not compiled: {why}" if found else "not compiled: the extension holds no CUDA ops"


@cache
def status() -> tuple[bool, str]:
    """Return whether the compiled extension is loaded, and the outcome of its build.

    The first call loads it; every later call returns the same answer.
    """
    record = "\n".join(_record())
    library = next(iter(sorted(_PACKAGE.glob("_C*.so"))), None)
    if library is None:
        return False, record if record.startswith("not compiled") else _NOT_INSTALLED
    if _SOURCES.is_file() and _SOURCES.read_text() != sources_digest():
        return False, "built from other sources than csrc/ has now: `pip install -e .` compiles it"
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < (2, 10):
        return False, f"built for torch >= 2.10, found {torch.__version__}: upgrade torch"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        # torch's own message names only the path; the loader's message is its cause
        return False, f"{library.name} does not load: {error.__cause__ or error}"
    return True, record or library.name
