"""Notebooks as pages of the site, and their outputs made anew.

python docs/hooks/notebooks.py            # run all of them and write their outputs
python docs/hooks/notebooks.py --check    # run all of them, and write nothing
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def page(path: Path) -> dict[str, Any]:
    """Return a notebook as Markdown, and its pictures: name of the file -> content."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts: list[str] = []
    files: dict[str, Any] = {}
    for cell in cells:
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source + "\n")
            continue
        parts.append(fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(files)}.png"
                files[name] = base64.b64decode(joined(data["image/png"]))
                parts.append(f"![output of the cell above]({name})\n")
            elif text := joined(output.get("text") or data.get("text/plain", "")):
                parts.append(
                    '<div class="output" markdown>\n\n' + fenced(text, "text") + "\n</div>\n"
                )
    parts.append(f"This page is the notebook `docs/notebooks/{path.name}` of the repository.\n")
    return {f"{path.stem}.md": "\n".join(parts), **files}


def run(path: Path, write: bool) -> None:
    """Run a notebook in a fresh kernel; an error in a cell is raised here."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which would differ from run to run
    if write:
        nbformat.write(notebook, path)


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:] if not name.startswith("--")]
    for notebook in chosen or sorted(FOLDER.glob("*.ipynb")):
        print(notebook.name, flush=True)
        run(notebook, write="--check" not in sys.argv)
