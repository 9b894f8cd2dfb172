"""DomainBed itself, where there is a clone of it, and a stand-in of its interface everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # tests are no package (import-mode=importlib)
from beds import STANDIN, Bed, first_images

from fastdg.domainbed import plug

CLONE = os.environ.get("DOMAINBED")


@pytest.fixture(params=["stand-in", "clone"])
def bed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bed]:
    clone = request.param == "clone"
    if clone and CLONE is None:
        pytest.skip(f"DOMAINBED is not set. {plug.MISSING}")
    folder = CLONE if clone else str(STANDIN)
    monkeypatch.setenv("DOMAINBED", folder)
    monkeypatch.syspath_prepend(folder)
    try:
        datasets = plug.find("datasets")
    except ImportError as error:
        pytest.skip(str(error))
    if clone:  # eight workers a loader are for other machines than a test's
        monkeypatch.setattr(datasets.MultipleDomainDataset, "N_WORKERS", 0)
    yield Bed(clone, folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "domainbed"]:
        del sys.modules[name]


@pytest.fixture
def double() -> Iterator[None]:
    """In float32 the curves part by more than 1e-5 within some steps: Adam divides by gradients
    that are nearly nothing but rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def small_mnist(fastdg_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's first images, as torchvision keeps them."""
    root = tmp_path_factory.mktemp("mnist")
    first_images(fastdg_data, root)
    return root
