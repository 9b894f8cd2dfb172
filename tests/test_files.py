"""Files are whole or not there, several runs may add to one, and damage and full disks are said."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from fastdg import files
from fastdg.files import locked, replace
from fastdg.studies.experiments.units import run_units

SETTINGS = {"steps": 1, "given": {"lr": 0.1}}


def value(k: int, seconds: float = 0.0) -> dict[str, int]:
    time.sleep(seconds)
    return {"value": k}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- whole or not there --


def half(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def behind(file: BinaryIO) -> None:
    """As torch.save, whose own error hides that of the disk."""
    try:
        half(file)
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")


@pytest.mark.parametrize("write", [half, behind])
def test_a_full_disk_is_said_and_the_old_file_stays(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"run\.pt: .*space"):
        replace(path, write)
    assert path.read_bytes() == b"old" and names_in(tmp_path) == ["run.pt"]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r": .*space"):
        replace(tmp_path / "new" / "folder" / "run.pt", half)
    with pytest.raises(KeyError), locked(tmp_path / "new" / "run.pt"):
        raise KeyError
    assert names_in(tmp_path) == []


def test_a_device_that_is_full_is_said_and_stays_a_device() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("/dev/full is not here")
    for write in (lambda file: file.write(b"x"), lambda file: torch.save(torch.zeros(9), file)):
        with pytest.raises(OSError, match=r"/dev/full: .*space") as caught:
            replace(full, write)
        assert caught.value.errno == errno.ENOSPC
    assert stat.S_ISCHR(full.stat().st_mode)


def test_checkpoints_of_torch_and_arrays_meet_a_real_limit(tmp_path: Path) -> None:
    """The system's own error in the middle of the file, in a process of its own."""
    code = f"""
import resource, signal, sys
from pathlib import Path
import numpy as np, torch
from fastdg.files import replace
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for write in (lambda f: torch.save(torch.zeros(9999), f), lambda f: np.savez(f, a=np.zeros(9999))):
    try:
        replace(Path({str(tmp_path)!r}, "run"), write)
    except OSError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("run: cannot write it, files of this size" in s for s in lines)
    assert names_in(tmp_path) == []


def test_an_error_that_is_not_the_disks_stays_as_it_is(tmp_path: Path) -> None:
    def broken(file: BinaryIO) -> None:
        raise TypeError("not to be written")

    with pytest.raises(TypeError, match=r"^not to be written$"):
        try:
            raise OSError(errno.ENOSPC, "of another file")
        except OSError:
            replace(tmp_path / "file", broken)
    assert names_in(tmp_path) == []


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    link, real = tmp_path / "results.json", tmp_path / "elsewhere" / "real.json"
    link.symlink_to(real)
    for content in (b"one", b"two"):  # the first time it leads to nothing
        with locked(link):
            replace(link, lambda file, content=content: file.write(content))
        assert link.is_symlink() and real.read_bytes() == content
    run_units({"a": partial(value, 1)}, SETTINGS, link, fresh=True)
    assert link.is_symlink() and json.loads(real.read_text())["runs"] == {"a": {"value": 1}}
    assert names_in(tmp_path / "elsewhere") == ["real.json"]
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(OSError, match=r"circle: .*symbolic link"):
        replace(circle, half)


def test_permissions_are_those_of_the_old_file_or_of_any_new_one(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    other.touch()
    replace(path, lambda file: file.write(b"x"))
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    replace(path, lambda file: file.write(b"y"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.read_bytes() == b"y"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, "permission denied. Change its rights or its folder's"),
        (errno.EROFS, "the file system is read-only. Choose another folder"),
        (errno.EDQUOT, "the quota of the disk is used up. Free some space"),
    ],
)
def test_what_the_system_refuses_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError(code, os.strerror(code), "somewhere")

    monkeypatch.setattr(files.os, "open", refuse)
    for change in (partial(replace, write=half), partial(locked(tmp_path / "a").__enter__)):
        with pytest.raises(OSError, match=f"a: cannot write it, {words}"):
            change(tmp_path / "a") if change.func is replace else change()


def test_folders_in_the_place_of_files_and_files_of_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match=r"cannot write it, .*folder"):
        replace(tmp_path, half)
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OSError, match="cannot write it, a file"):
            replace(path, half)
    (tmp_path / "results.json").mkdir()
    with pytest.raises(OSError, match=r"results\.json: cannot read it, .*folder"):
        run_units({}, SETTINGS, tmp_path / "results.json")


# -- one at a time --


@pytest.fixture(params=["flock", "no flock", "no fcntl"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    elif request.param == "no flock":

        def refuse(*arguments: Any) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def test_threads_that_add_to_one_file_lose_nothing(tmp_path: Path, locks: str) -> None:
    path = tmp_path / "results.json"

    def run(name: str) -> None:
        given = {f"{name}{k}": partial(value, k, 0.001) for k in range(12)}
        assert run_units(given, SETTINGS, path)["runs"].keys() == given.keys()

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_text())["runs"]) == 36
    assert names_in(tmp_path) == ["results.json"]


LOAD = f"""
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})  # without torch
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path = Path(sys.argv[1])
"""
ADD = """
if sys.argv[3] == "no flock":
    files.fcntl = None
for k in range(40):
    with files.locked(path):
        before = path.read_text() if path.exists() else ""
        files.replace(path, lambda file: file.write(f"{before}{sys.argv[2]}{k} ".encode()))
"""


@pytest.mark.parametrize("way", ["flock", "no flock"])
def test_processes_that_add_to_one_file_lose_nothing(tmp_path: Path, way: str) -> None:
    path = tmp_path / "file"
    command = [sys.executable, "-c", LOAD + ADD, str(path)]
    processes = [subprocess.Popen([*command, name, way]) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(path.read_text().split()) == sorted(f"{n}{k}" for n in "ab" for k in range(40))
    assert names_in(tmp_path) == ["file"]


def test_of_one_unit_the_result_that_is_written_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def overtaken() -> dict[str, int]:
        run_units({"a": partial(value, 1)}, SETTINGS, path)
        return {"value": 2}

    for fresh in (False, True):
        results = run_units({"a": overtaken, "b": partial(value, 3)}, SETTINGS, path, fresh=fresh)
        assert results["runs"] == {"a": {"value": 1}, "b": {"value": 3}}
        assert json.loads(path.read_text())["runs"] == results["runs"]
        path.unlink()


def test_a_file_that_vanishes_or_becomes_anothers_during_a_run(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def removes() -> dict[str, int]:
        path.unlink()
        return {"value": 2}

    def other() -> dict[str, int]:
        run_units({}, {"steps": 2}, path, fresh=True)
        return {"value": 3}

    run_units({"a": partial(value, 1)}, SETTINGS, path)
    runs = run_units({"a": partial(value, 1), "b": removes}, SETTINGS, path)["runs"]
    assert runs == json.loads(path.read_text())["runs"] == {"a": {"value": 1}, "b": {"value": 2}}
    with pytest.raises(ValueError, match="steps was 2, now 1"):
        run_units({"c": other}, SETTINGS, path)


def test_a_fresh_run_forgets_what_others_have_made_before(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run_units({"a": partial(value, 1)}, SETTINGS, path)
    again = run_units({"a": partial(value, 2)}, SETTINGS, path, fresh=True)["runs"]
    assert again == json.loads(path.read_text())["runs"] == {"a": {"value": 2}}


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = LOAD + "with files.locked(path): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError, match="file: another run"):
        locked(path, patience=0.1).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with locked(path, patience=5):
        pass
    assert names_in(tmp_path) == []


def test_a_lock_left_where_there_is_no_flock_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    holder = locked(tmp_path / "file")
    holder.__enter__()
    words = rf"If process {os.getpid()} on .* no longer runs, remove .*/\.file\.locked\."
    with pytest.raises(TimeoutError, match=words):
        locked(tmp_path / "file", patience=0).__enter__()
    (tmp_path / ".file.locked").unlink()
    with locked(tmp_path / "file", patience=0):
        pass


def test_benchmarks_add_to_one_file(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "benchmarks" / "result_files.py"
    spec = importlib.util.spec_from_file_location("result_files", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path / "new" / "cpu.json"

    def run(name: str) -> None:
        for k in range(12):
            module.keep(path, {"by": name}, {"cases": {f"{name}{k}": {"k": k}}, "ops": {}})

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = json.loads(path.read_text())
    assert len(written["cases"]) == 36 and written["ops"] == {} and written["by"] in "abc"
    module.keep(path, {}, {"cases": {"d": 1}}, fresh=True)
    assert json.loads(path.read_text()) == {"cases": {"d": 1}}
    for content in ("", "[]", '{"cases": 3}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"cpu\.json: .*Restore"):
            module.keep(path, {}, {"cases": {"e": 1}})
        assert path.read_text() == content
