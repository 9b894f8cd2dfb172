"""List the examples: what each shows, and the packages that it needs."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from . import INSTALLED_BY


def examples() -> Iterator[tuple[str, str, list[str]]]:
    """Yield the name, the sentence, and the packages of each."""
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        if path.stem != "data":
            sentence = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0]
            called = re.search(r"with needs\((.*?)\)", source)
            packages = re.findall(r"\w+", called[1]) if called else []
            yield path.stem, " ".join(sentence.split()), packages


def main() -> None:
    print("python -m fastdg.examples.NAME, where NAME is one of\n")
    for name, sentence, packages in examples():
        if packages:
            by = ", ".join(sorted({INSTALLED_BY[package] for package in packages}))
            sentence += f" Needs {', '.join(packages)}: pip install '{by}'."
        lines = textwrap.wrap(sentence, 74, initial_indent="  ", subsequent_indent="  ")
        print(name, *lines, sep="\n")


if __name__ == "__main__":
    main()
