"""The ranks of all tests here: processes started once, since each takes seconds to import torch."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed

sys.path.append(str(Path(__file__).parent))

if not (distributed.is_available() and distributed.is_gloo_available()):
    collect_ignore_glob = ["*"]

from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool(3)
    yield pool
    pool.close()
