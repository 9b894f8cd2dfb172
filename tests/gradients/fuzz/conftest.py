"""Tests are no package (import-mode=importlib): the operations are imported by their plain name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
