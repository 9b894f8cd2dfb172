"""Short training scripts, each to be run as ``python -m fastdg.examples.NAME``; ``python -m
fastdg.examples`` lists them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# Optional package -> what brings it
INSTALLED_BY = {
    "accelerate": "fastdg[integrations]",
    "lightning": "fastdg[integrations]",
    "tensorboard": "fastdg[integrations]",
    "transformers": "fastdg[integrations]",
    "wilds": "wilds",
}


@contextmanager
def needs(*packages: str) -> Iterator[None]:
    """Imports inside need these packages: without one, end with a line on how to install it."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        by = " ".join(f"'{name}'" for name in sorted({INSTALLED_BY[name] for name in missing}))
        sys.exit(f"fastdg: this example needs {', '.join(missing)}: pip install {by}")
    yield
