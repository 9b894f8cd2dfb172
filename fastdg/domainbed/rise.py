"""RISE in DomainBed: a student that embeds images among words, and CLIP as its teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..algorithms.rise import RISE
from ..text import text_tables
from .adapter import Adapter


class RISEAdapter(Adapter):
    """The network gets a linear layer between features and classifier, whose output is the
    embedding; the classifier begins as the texts of the classes, as in the paper.

    ``rise_clip`` names a CLIP model for transformers, on the hub or a folder. It sees the
    student's images, as in the authors' code. ``rise_classes`` has to name the classes, in the
    order of the labels: DomainBed does not pass their names to algorithms.
    """

    featurizer: Any

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        hparams, num_classes = self.hparams, args[1]
        names = hparams["rise_classes"]
        if len(names) != num_classes:
            raise ValueError(
                f"rise_classes: expected the names of the {num_classes} classes in the order "
                f"of the labels, which RISE compares with images, got {list(names)!r}. Pass "
                """--hparams '{"rise_classes": ["dog", ...]}'."""
            )
        self.tables = text_tables(names, hparams["rise_anchors"], hparams["rise_clip"])
        words = F.normalize(self.tables.classes, dim=1)
        embedding = nn.Linear(self.featurizer.n_outputs, words.shape[1])
        classifier = nn.Linear(words.shape[1], num_classes)
        with torch.no_grad():
            classifier.weight.copy_(words)
        self.classifier = nn.Sequential(embedding, classifier)
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )
        self.teacher = Teacher(hparams["rise_clip"], words)

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = self.network(x)
        losses = F.cross_entropy(logits, y, reduction="none")
        weight = 1 - self.hparams["rise_distillation"]  # the two sum to 1 in the paper's search
        inputs = {"labels": y, "logits": logits, "teacher_logits": self.teacher(x)}
        return weight * losses, inputs


class Teacher:
    """CLIP's logits of images: 100 times the cosines with the words ``[C, E]``.

    No module, so that it is not saved with the student.
    """

    def __init__(self, name: str, words: Tensor) -> None:
        from transformers import CLIPVisionModelWithProjection

        self.vision: Any = CLIPVisionModelWithProjection.from_pretrained(name).eval()
        self.words = words

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if self.words.device != x.device:
            self.vision, self.words = self.vision.to(x.device), self.words.to(x.device)
        return 100 * F.normalize(self.vision(x).image_embeds, dim=1) @ self.words.t()


def rise(algorithm: Any) -> RISE:
    hparams = algorithm.hparams
    return RISE(
        algorithm.optimizer,
        algorithm.classifier[0],
        *algorithm.tables,
        absolute=hparams["rise_distance"],
        relative=hparams["rise_distance"],
        distillation=hparams["rise_distillation"],
        temperature=hparams["rise_temperature"],
        num_domains=algorithm.num_domains,
    )
