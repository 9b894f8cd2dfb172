"""Tests are no package (import-mode=importlib), so what they share is imported by plain name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
