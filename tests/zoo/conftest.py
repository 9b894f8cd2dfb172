"""Tests are no package (import-mode=importlib): the zoo's files are imported by plain names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "statistics"))  # its oracle
