"""Tests are no package (import-mode=importlib): what they share is imported by its plain name."""

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path += [str(here), str(here.parent.parent / "optim")]
