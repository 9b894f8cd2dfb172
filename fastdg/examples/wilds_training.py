"""WILDS, with its group loaders and its grouper: Fishr, Fish and Agr-Sum.

Runs on a small data set made here; on one of WILDS's by its name, with any network in place of the
one below:

    python -m fastdg.examples.wilds_training --dataset camelyon17 --groupby hospital --download
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg

from . import needs

with needs("wilds"):
    from PIL import Image
    from wilds import get_dataset
    from wilds.common.data_loaders import get_eval_loader, get_train_loader
    from wilds.common.grouper import CombinatorialGrouper
    from wilds.common.metrics.all_metrics import Accuracy
    from wilds.datasets.wilds_dataset import WILDSDataset

STAINS = np.array([[180, 110, 160], [150, 100, 170], [190, 130, 140], [160, 140, 150]])


class Slides(WILDSDataset):
    """Tissue with or without a dark spot, from three hospitals in training and one in the test,
    each with a stain of its own."""

    _dataset_name, _split_scheme, _data_dir = "slides", "official", "."
    _y_size, _n_classes = 1, 2

    def __init__(self, samples: int = 600) -> None:
        draw = np.random.default_rng(0)
        hospital, label = draw.integers(0, 4, samples), draw.integers(0, 2, samples)
        pixels = draw.normal(STAINS[hospital][:, None, None], 20, (samples, 32, 32, 3))
        for i, (row, column) in enumerate(draw.integers(4, 20, (samples, 2))):
            pixels[i, row : row + 8, column : column + 8] -= 60 * label[i]
        self._images = pixels.clip(0, 255).astype(np.uint8)
        late = draw.random(samples) < 0.2
        self._split_array = np.where(hospital == 3, 2, late)
        self._y_array = torch.from_numpy(label)
        self._metadata_fields = ["hospital", "y"]
        self._metadata_array = torch.from_numpy(np.stack([hospital, label], 1))
        super().__init__(root_dir=None, download=False, split_scheme="official")

    def get_input(self, idx: int) -> Image.Image:
        return Image.fromarray(self._images[idx])

    def eval(self, y_pred: Tensor, y_true: Tensor, metadata: Tensor) -> Any:
        return self.standard_eval(Accuracy(), y_pred, y_true)


def pixels(image: Image.Image) -> Tensor:
    array = np.array(image.convert("RGB").resize((32, 32)))
    return torch.from_numpy(array).permute(2, 0, 1) / 255


def network(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def train(algorithm: str, dataset: Any, groupby: Sequence[str], epochs: int) -> dict[str, Any]:
    """Train on the groups of the training split; return the data set's own `eval` of the test
    split."""
    torch.manual_seed(0)
    np.random.seed(0)  # WILDS draws groups and samples from it
    grouper = CombinatorialGrouper(dataset, list(groupby))
    split = dataset.get_subset("train", transform=pixels)
    groups = grouper.metadata_to_group(split.metadata_array).unique()
    together = min(4, len(groups))
    loader = get_train_loader(
        "group", split, batch_size=16 * together, grouper=grouper, n_groups_per_batch=together
    )

    model = network(dataset.n_classes)
    base = torch.optim.Adam(model.parameters(), lr=3e-3)
    domains = len(groups)
    opt: fastdg.DomainOptimizer
    if algorithm == "Fishr":
        opt = fastdg.Fishr(base, anneal_steps=10, num_domains=domains)
    elif algorithm == "Fish":
        opt = fastdg.Fish(base, num_domains=domains, meta_steps=together, model=model)
    else:
        opt = fastdg.AgrSum(base, num_domains=domains)

    for _ in range(epochs):
        for x, y, metadata in loader:
            # The groups that are in training, numbered from 0 on
            domain = torch.searchsorted(groups, grouper.metadata_to_group(metadata))
            # Fish takes its steps on one domain after the other, the others on all at once
            parts = [domain == d for d in domain.unique()] if algorithm == "Fish" else [domain >= 0]
            for part in parts:
                losses = F.cross_entropy(model(x[part]), y[part], reduction="none")
                opt.zero_grad()
                opt.backward(losses, domain[part])
                opt.step()

    model.eval()
    test = get_eval_loader("standard", dataset.get_subset("test", transform=pixels), batch_size=64)
    with torch.no_grad():
        seen = [(model(x).argmax(1), y, metadata) for x, y, metadata in test]
    results, _ = dataset.eval(*(torch.cat(part) for part in zip(*seen, strict=True)))
    return results


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", help="a name that wilds.get_dataset knows")
    parser.add_argument("--root_dir", default="data")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--groupby", nargs="+", default=["hospital"], help="fields of its metadata")
    parser.add_argument("--algorithms", nargs="+", default=["Fishr", "Fish", "AgrSum"])
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args(arguments)
    if given.dataset is None:
        dataset: Any = Slides()
    else:
        dataset = get_dataset(given.dataset, root_dir=given.root_dir, download=given.download)
    for algorithm in given.algorithms:
        results = train(algorithm, dataset, given.groupby, given.epochs)
        print(f"{algorithm}: {100 * results['acc_avg']:.0f} % right on the test split")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
