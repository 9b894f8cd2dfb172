"""Files that are whole or not there, changed by one process at a time; their errors in words."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]
if TYPE_CHECKING:
    import numpy as np

_SPACE = "Free some space, or choose another folder."
_RIGHTS = "Change its rights or its folder's, or choose another folder."
_WORDS = {
    errno.ENOSPC: ("no space is left on the disk", _SPACE),
    errno.EDQUOT: ("the quota of the disk is used up", _SPACE),
    errno.EFBIG: ("files of this size are not allowed (ulimit -f)", _SPACE),
    errno.EACCES: ("permission denied", _RIGHTS),
    errno.EPERM: ("permission denied", _RIGHTS),
    errno.EROFS: ("the file system is read-only", "Choose another folder."),
    errno.EISDIR: ("it is a folder", "Remove the folder, or choose another path."),
    errno.EEXIST: ("a file is in the place of one of its folders", "Choose another folder."),
    errno.ENOTDIR: ("a file is in the place of one of its folders", "Choose another folder."),
    errno.ELOOP: ("it is a symbolic link that leads to itself", "Remove the link."),
    errno.ENOENT: ("there is no such file", "Check the path."),
}


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError inside, also one behind another error, into one whose text is a sentence.

    Its class and its ``errno`` stay. ``doing`` is "read" or "write".
    """
    handled = sys.exc_info()[1]  # by the caller: not an error of this file
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # torch.save hides the disk's behind one of its own
        while cause not in (None, handled) and not isinstance(cause, OSError):
            cause = cause.__context__
        if not isinstance(cause, OSError) or cause is handled or cause.errno is None:
            raise
        problem, remedy = _WORDS.get(cause.errno, (cause.strerror or str(cause), "Try again."))
        said = type(cause)(f"{path}: cannot {doing} it, {problem}. {remedy}")
        said.errno = cause.errno
        raise said from error


def target(path: Path) -> Path:
    """Follow symbolic links, also to a file that is not there yet.

    Raises:
        OSError: they lead in a circle.
    """
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make the folder; if the block fails, remove the folders made that are still empty."""
    missing = list(takewhile(lambda f: not f.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for made in missing:
            with suppress(OSError):
                made.rmdir()
        raise


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` make the file at ``path``; a kill at any moment, or an error, leaves the old
    one or the new one.

    A symbolic link stays one: the file that it leads to is replaced. So do the file's permissions.

    Raises:
        OSError: the disk is full, the path is a folder, ...; says so in a sentence.
    """
    with explained(path, "write"):
        real = target(path)
        if real.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if real.exists() and not real.is_file():  # a device or a pipe, which cannot be replaced
            with real.open("wb") as file:
                write(file)
            return
        with _folder(real.parent):
            temporary = real.with_name(f".{real.name[:200]}.{secrets.token_hex(4)}")
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            handle = os.open(temporary, flags, 0o666)
            try:
                with os.fdopen(handle, "w+b") as file:
                    if real.exists() and hasattr(os, "fchmod"):
                        os.fchmod(handle, stat.S_IMODE(real.stat().st_mode))
                    write(file)
                    file.flush()
                    os.fsync(handle)
                os.replace(temporary, real)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


# -- locks --


@contextmanager
def locked(path: Path, patience: float = 60.0) -> Iterator[None]:
    """Keep out all other threads and processes that lock ``path``, which need not exist.

    The lock is flock's, on a file beside ``path`` that is removed afterwards: the system releases
    it when its holder ends, however that ends. Where the file system has no flock, a file that
    exists is the lock, and a holder that was killed leaves it: the error says which one to remove.

    Args:
        path: the file to change. Its folder is made, and removed if the block fails and leaves it
            empty.
        patience: seconds to wait for the others.

    Raises:
        TimeoutError: the others still hold it; names the file to change.
        OSError: the lock cannot be made; says so in a sentence.
    """
    with ExitStack() as stack:
        with explained(path, "write"):
            real = target(path)
            stack.enter_context(_folder(real.parent))
            stack.callback(_acquired(path, real.with_name(f".{real.name[:200]}.lock"), patience))
        yield


def _acquired(path: Path, lock: Path, patience: float) -> Callable[[], None]:
    """Wait for the lock; returns the function that releases it."""
    deadline = time.monotonic() + patience
    while (release := (_flock(lock) if fcntl else None) or _claim(lock)) is _HELD:
        if time.monotonic() >= deadline:
            who = lock.with_name(f"{lock.name}ed")
            said = f"{path}: another run is writing it. Wait for its end, or choose another folder."
            with suppress(OSError):
                said += f" If {who.read_text()} no longer runs, remove {who}."
            raise TimeoutError(said)
        time.sleep(0.02)
    return release


def _HELD() -> None:
    """Stands for a lock that another holds."""


def _flock(lock: Path) -> Callable[[], None] | None:
    """The function that releases the lock, `_HELD`, or None where there is no flock."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)

    def release() -> None:
        lock.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)  # children that were forked meanwhile have it too
        os.close(handle)

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return _HELD
    except OSError:
        os.close(handle)
        lock.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # else its last holder removed it, and others may lock a new one
        if os.path.samestat(os.fstat(handle), os.stat(lock)):
            return release
    os.close(handle)
    return _HELD


def _claim(lock: Path) -> Callable[[], None]:
    """The same by a file that must not be there yet."""
    lock = lock.with_name(f"{lock.name}ed")
    try:
        handle = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return _HELD
    with os.fdopen(handle, "w") as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
    return lambda: lock.unlink(missing_ok=True)


# -- reading --


def load_arrays(path: Path, *names: str, remedy: str) -> dict[str, np.ndarray]:
    """Read arrays of an ``.npz`` by name, all of them without ``names``.

    Raises:
        OSError: it cannot be read; ValueError: it is damaged or lacks one. Both in a sentence,
            which ends in ``remedy``.
    """
    import numpy as np

    with explained(path, "read"):
        file = path.open("rb")
    with file, _undamaged(path, remedy), np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names or arrays.files}


def load_torch(path: Path, remedy: str, whole: bool = True) -> Any:
    """Read a file of ``torch.save``, on the CPU, tensors and plain types only.

    Args:
        path: of the file.
        remedy: the last sentence of an error.
        whole: check all of it. Else tensors are read when they are used.

    Raises:
        OSError: it cannot be read; ValueError: it is damaged. Both in a sentence.
    """
    import zipfile

    import torch

    with explained(path, "read"):
        file = path.open("rb")
    with file, _undamaged(path, remedy):
        if whole and zipfile.is_zipfile(file):  # torch does not look at the checksums
            with zipfile.ZipFile(file) as archive:
                if (part := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {part} does not match")
        file.seek(0)
        source: Any = file if whole else str(path)
        return torch.load(source, map_location="cpu", weights_only=True, mmap=not whole)


@contextmanager
def _undamaged(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile, zlib, pickle, NumPy, torch: each has errors of its own
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise ValueError(
            f"{path}: damaged, or of another kind ({reason.rstrip('.')}). {remedy}"
        ) from error
