"""The shape of the package: imports run one way, and no file or folder grows too large.

`TYPE_CHECKING` imports count. The lists of exceptions may only shrink.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import fastdg
import fastdg.kernels

ROOT = Path(fastdg.__file__).parent
# A layer imports itself and layers below it. Files that stand alone in fastdg/ are not listed.
LAYERS = (
    {"studies", "domainbed", "cli", "examples"},
    {"algorithms", "selfsup", "averaging", "outer", "weightings"},
    {"core"},
    {"distributed", "capture"},
    {"statistics"},
    {"gradients"},
    {"factors"},
    {"ops", "kernels"},
)
LINES, ALGORITHM_LINES, FILES = 350, 120, 20
UPWARD: set[tuple[str, str]] = set()
LONG: set[str] = set()
CIRCULAR: set[str] = set()
FULL: set[str] = set()


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package -> its file."""
    found = {}
    kernels = [("fastdg.kernels", Path(path)) for path in fastdg.kernels.__path__]
    for name, folder in [("fastdg", ROOT), *kernels]:
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([name, *parts])] = file
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in its text."""
    file = MODULES[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in MODULES or base in MODULES:
                    yield inner if inner in MODULES else base


GRAPH = {name: {to for to in imports(name) if to != name} for name in MODULES}


def layer(name: str) -> int | None:
    folder = f"{name}.".split(".")[1]
    return next((i for i, names in enumerate(LAYERS) if folder in names), None)


def short(name: str) -> str:
    return name.removeprefix("fastdg.")


def test_imports_run_downwards():
    upward = {
        (short(name), short(to))
        for name, found in GRAPH.items()
        for to in found
        if (own := layer(name)) is not None and (other := layer(to)) is not None and other < own
    }
    assert upward == UPWARD


def test_no_module_imports_itself_through_others():
    reached = {name: set(found) for name, found in GRAPH.items()}
    for middle in GRAPH:
        for found in reached.values():
            if middle in found:
                found |= reached[middle]
    assert {short(name) for name in GRAPH if name in reached[name]} == CIRCULAR


def test_no_file_is_too_long():
    lines = {short(name): len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert {name for name, n in lines.items() if n > LINES} == LONG
    found = {name for name, n in lines.items() if n > ALGORITHM_LINES}
    assert not {name for name in found if name.startswith("algorithms.")}


def test_no_folder_is_too_full():
    files = [file.parent for file in MODULES.values() if file.name != "__init__.py"]
    assert {folder.name for folder in files if files.count(folder) > FILES} == FULL


def writes_grad(file: Path) -> bool:
    """Whether the file assigns to ``.grad`` somewhere, or changes it in place."""
    for node in ast.walk(ast.parse(file.read_text())):
        written = node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.strip("_") + "_" != node.func.attr:
                continue
            written = node.func.value
        elif not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)):
            continue
        if isinstance(written, ast.Attribute) and written.attr == "grad":
            return True
    return False


def test_one_file_writes_grad():
    # What users would write in a training script of their own may do so
    scripts = ("examples", "studies", "domainbed", "cli")
    found = {
        short(name)
        for name, file in MODULES.items()
        if not short(name).startswith(scripts) and writes_grad(file)
    }
    assert found == {"core.backward"}
