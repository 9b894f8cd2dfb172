"""The command line ``fastdg``: list, demo, benchmark, reproduce, pacs, info."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("typer", "rich", "matplotlib", "sklearn")


def main() -> None:
    """Run the command line, or say which packages it needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join("scikit-learn" if name == "sklearn" else name for name in missing)
        sys.exit(f"fastdg: the command line needs {names}: pip install 'fastdg[demo]'")
    from .app import app

    app()
