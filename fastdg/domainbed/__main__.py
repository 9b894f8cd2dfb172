"""``python -m fastdg.domainbed`` in place of ``python -m domainbed.scripts.train``, and
``python -m fastdg.domainbed sweep`` in place of ``python -m domainbed.scripts.sweep``.

Both run DomainBed's own script, unmodified, with all of its arguments. The environment variable
``DOMAINBED`` or ``PYTHONPATH`` names DomainBed's folder. Repeat the command of a killed run to
resume it; ``python -m fastdg.domainbed resume SWEEP --command_launcher local`` repeats the commands
of a whole sweep. ``python -m fastdg.domainbed trainer train_all.py ...`` runs the trainer of
another clone (`fastdg.domainbed.trainer`).
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..files import locked
from .plug import COMMAND, find, launching_fastdg, plugged_in
from .resume import FILE, Journal, Refused, runs_to_resume
from .trainer import run_trainer


def train(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output_dir", default="train_output")  # DomainBed's default
    folder = Path(parser.parse_known_args(arguments)[0].output_dir)
    with locked(folder / FILE, patience=15):  # workers of a killed run outlive it by some seconds
        journal = Journal(folder, arguments, find("lib.misc").accuracy)
        with plugged_in(journal):
            script("train", arguments)
        journal.done()


def sweep(arguments: Sequence[str]) -> None:
    with plugged_in(), launching_fastdg():
        script("sweep", arguments)


def resume(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdg.domainbed resume")
    parser.add_argument("folder", type=Path, help="the --output_dir of a sweep, or of a run")
    parser.add_argument("--command_launcher", default="local", help="as of the sweep")
    given = parser.parse_args(arguments)
    launcher = find("command_launchers").REGISTRY[given.command_launcher]
    launcher([f"{COMMAND} {shlex.join(run)}" for run in runs_to_resume(given.folder)])


def script(name: str, arguments: Sequence[str]) -> None:
    """Run one of DomainBed's, as if it had been called with these arguments."""
    before = sys.argv, sys.stdout, sys.stderr
    sys.argv = [f"domainbed.scripts.{name}", *arguments]
    try:
        runpy.run_module(f"domainbed.scripts.{name}", run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.stdout, sys.stderr = before  # the script's own write to files of the run


def main(arguments: Sequence[str]) -> None:
    commands = {"sweep": sweep, "resume": resume, "trainer": run_trainer}
    if arguments and arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    else:
        train(arguments)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] != ["trainer"]:
            find("algorithms")
    except ImportError as error:
        sys.exit(str(error))
    try:
        main(sys.argv[1:])
    except (Refused, TimeoutError) as error:
        sys.exit(f"fastdg: {error}")
