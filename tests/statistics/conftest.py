"""Tests are no package (import-mode=importlib): the oracle is imported by its plain name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
