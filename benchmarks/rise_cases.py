"""RISE's losses and their gradients, on embeddings and logits that are there: ours, and the ways
one would write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg

Gradients = tuple[Tensor, Tensor]  # by the embeddings and by the logits
TEMPERATURE, DISTILLATION = 3.0, 0.9


@dataclass(frozen=True)
class Batch:
    """B embeddings of E numbers, logits of C classes, the teacher's, and C texts with A anchors,
    of length 1."""

    embeddings: Tensor
    logits: Tensor
    labels: Tensor
    teacher: Tensor
    classes: Tensor
    anchors: Tensor

    @classmethod
    def of(cls, B: int = 128, C: int = 65, A: int = 3, E: int = 512) -> Batch:
        torch.manual_seed(0)
        classes = F.normalize(torch.randn(C, E), dim=1)
        anchors = F.normalize(classes.unsqueeze(1) + torch.randn(C, A, E) / E**0.5, dim=2)
        embeddings, logits = torch.randn(B, E), torch.randn(B, C)
        labels, teacher = torch.randint(C, (B,)), 5 * torch.randn(B, C)
        return cls(
            embeddings.requires_grad_(), logits.requires_grad_(), labels, teacher, classes, anchors
        )

    def double(self) -> Batch:
        def exact(x: Tensor) -> Tensor:
            found = x.detach().double() if x.is_floating_point() else x
            return found.requires_grad_(x.requires_grad)

        return Batch(**{name: exact(x) for name, x in vars(self).items()})

    def gradients(self, objective: Tensor) -> Gradients:
        return torch.autograd.grad(objective, (self.embeddings, self.logits))

    def distillation(self) -> Tensor:
        student, teacher = self.logits / TEMPERATURE, self.teacher / TEMPERATURE
        return TEMPERATURE**2 * F.kl_div(
            student.log_softmax(1), teacher.softmax(1), reduction="batchmean"
        )


def ours(on: Batch) -> Callable[[], Gradients]:
    """The term of `fastdg.RISE`, every check on its inputs among it."""
    layer = nn.Identity()
    base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    opt = fastdg.RISE(
        base, layer, on.classes, on.anchors, distillation=DISTILLATION, temperature=TEMPERATURE
    )
    given = {"labels": on.labels, "logits": on.logits, "teacher_logits": on.teacher}

    def run() -> Gradients:
        layer(on.embeddings)
        losses = F.cross_entropy(on.logits, on.labels, reduction="none")
        return on.gradients((losses + opt.added(losses, given).values).mean())

    return run


def reference(on: Batch) -> Callable[[], Gradients]:
    run = ours(on)

    def forced() -> Gradients:
        with fastdg.use_backend("reference"):
            return run()

    return forced


def vectorised(on: Batch) -> Callable[[], Gradients]:
    """As an expert writes it for autograd, the teacher's table made once."""
    table = (on.anchors @ on.classes.unsqueeze(2)).squeeze(2).softmax(1)

    def run() -> Gradients:
        s = F.normalize(on.embeddings, dim=1)
        absolute = 1 - (s * on.classes[on.labels]).sum(1).mean()
        around = (on.anchors[on.labels] @ s.unsqueeze(2)).squeeze(2).softmax(1)
        relative = 10 * F.mse_loss(around, table[on.labels])
        loss = F.cross_entropy(on.logits, on.labels)
        return on.gradients(loss + absolute + relative + DISTILLATION * on.distillation())

    return run


def loops(on: Batch) -> Callable[[], Gradients]:
    """As the paper's code does it: sample by sample, anchor by anchor."""

    def run() -> Gradients:
        absolute, ours, theirs = [], [], []
        for s, y in zip(on.embeddings, on.labels.tolist(), strict=True):
            text = on.classes[y]
            absolute.append(1 - F.cosine_similarity(s, text, 0))
            ours.append(torch.stack([F.cosine_similarity(s, k, 0) for k in on.anchors[y]]))
            theirs.append(torch.stack([F.cosine_similarity(text, k, 0) for k in on.anchors[y]]))
        relative = 10 * F.mse_loss(torch.stack(ours).softmax(1), torch.stack(theirs).softmax(1))
        distances = torch.stack(absolute).mean() + relative
        loss = F.cross_entropy(on.logits, on.labels)
        return on.gradients(loss + distances + DISTILLATION * on.distillation())

    return run


def plain(on: Batch) -> Callable[[], Gradients]:
    """The cross-entropy alone."""
    return lambda: torch.autograd.grad(F.cross_entropy(on.logits, on.labels), on.logits)


WAYS: dict[str, Callable[[Batch], Callable[[], Gradients]]] = {
    "cross-entropy alone": plain,
    "fastdg": ours,
    "fastdg, reference backend": reference,
    "vectorised": vectorised,
    "loop over samples": loops,
}
