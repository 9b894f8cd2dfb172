"""RISE: let images be where a teacher sees the words for them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .._torch import assert_later, in_backward, version_of
from ..capture.graph_notes import Hook, found, mark, recording
from ..core.configured import Configured
from ..core.hyper import check_steepness, check_weight, hyper
from ..core.term import Term
from ..domains import readable
from ..dtypes import to_statistics_dtype
from ..ops import text_distance


@dataclass
class Forward:
    """A forward of the module.

    Attributes:
        output: what it gave.
        version: of that then, if it has a graph.
        token: left on its graph node then, to tell losses that come from it.
    """

    output: Any
    version: int | None = None
    token: object = field(default_factory=object)


class RISE(Term):
    r"""Distil CLIP with language guidance:
    ``objective = mean of the losses + w_kd KD + w_abs AD + w_rel RD``.

    .. math::
        \text{KD} &= \frac{\tau^2}N \sum_n \operatorname{KL}\bigl(
            \operatorname{softmax}(t_n/\tau) \,\big\|\, \operatorname{softmax}(z_n/\tau)\bigr), \\
        \text{AD} &= \frac1N \sum_n \bigl(1 - \cos(s_n, T_{y_n})\bigr), \\
        \text{RD} &= \frac{10}{NA} \sum_{na} \bigl(\operatorname{softmax}_a \cos(s_n, K_{y_n a})
            - \operatorname{softmax}_a \cos(T_{y_n}, K_{y_n a})\bigr)^2

    s are embeddings of images, z their logits, t the teacher's logits; T are embeddings of the
    classes' texts, K those of anchors: texts of each class in each domain.

    The losses enter as they are passed to `backward`. The paper weighs the cross-entropy too (with
    0.1 on PACS and VLCS, where the other weights are the defaults): pass ``0.1 * losses``, which
    means the same under every algorithm around this term.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or another term.
        embedding: the module whose output is s ``[N, E]``; E is that of the texts (the paper's is a
            linear layer after the backbone, and the classifier starts as the texts themselves).
        classes: ``[C, E]``, text embeddings of the classes in the order of the labels, of any
            length; see `text_tables`.
        anchors: ``[C, A, E]``; None: no relative distance.
        absolute, relative, distillation: the weights :math:`w`.
        temperature: :math:`\tau`.
        num_domains: D; default: as many as have been seen.
        model: its parameters' names are used in messages.

    The weights and the temperature live in ``param_groups[0]`` (as ``rise_absolute`` and so on).
    ``statistics`` holds ``loss``, ``objective``, ``domain_loss``, ``domain_count``, and, without
    their weights, ``rise_absolute``, ``rise_relative`` (with anchors) and ``rise_distillation``
    (with a teacher), 0-dim and detached.

    `backward` takes three more inputs: ``opt.backward(losses, domains, labels=labels,
    logits=logits, teacher_logits=teacher_logits)``.

    A closure of `step` returns them as a third: ``(losses, domains, dict(labels=labels))``.

    - ``labels``: class y of each sample ``[N]``, on the device of ``losses`` or the CPU.
    - ``logits``: z ``[N, C]``, with their graph; needed with ``teacher_logits`` only.
    - ``teacher_logits``: t ``[N, C]``: 100 times the cosines of the teacher's image embeddings with
      the class texts; of several teachers, `mix_teachers` of theirs. None: no distillation.

    Raises:
        TypeError, ValueError: an argument is not as described; a class without text is named.

    Reference:
        Huang et al.: A Sentence Speaks a Thousand Images: Domain Generalization through Distilling
        CLIP with Language Guidance, ICCV 2023. The defaults are of its search on PACS.

    Example:
        >>> tables = fastdg.text_tables(class_names, domain_names, "openai/clip-vit-base-patch32")
        >>> opt = fastdg.RISE(torch.optim.SGD(model.parameters(), lr=1e-3), model.embed, *tables)
        >>> logits = model(x)
        >>> losses = 0.1 * F.cross_entropy(logits, y, reduction="none")
        >>> opt.zero_grad()
        >>> opt.backward(losses, domains, labels=y, logits=logits, teacher_logits=teacher(x))
        >>> opt.step()
    """

    prefix = "rise"
    _transient = (*Term._transient, "_seen")

    _seen: Forward | None  # the one that waits for its backward

    absolute: float = hyper(1.0, check_weight)
    relative: float = hyper(1.0, check_weight)
    distillation: float = hyper(0.9, check_weight)
    temperature: float = hyper(3.0, check_steepness)

    def __init__(
        self,
        base: Optimizer,
        embedding: nn.Module,
        classes: Tensor,
        anchors: Tensor | None = None,
        *,
        absolute: float = 1.0,
        relative: float = 1.0,
        distillation: float = 0.9,
        temperature: float = 3.0,
        num_domains: int | None = None,
        model: nn.Module | None = None,
        check: bool = True,
    ) -> None:
        if not isinstance(embedding, nn.Module):
            raise TypeError(
                "embedding: expected the module whose output the embeddings are, got "
                f"{type(embedding).__name__}"
            )
        self.classes, self.anchors = _units(classes, anchors)
        self.teacher = (self.anchors @ self.classes.unsqueeze(2)).squeeze(2).softmax(1)
        self.embedding = embedding
        Configured.__init__(
            self,
            base,
            num_domains=num_domains,
            model=model,
            check=check,
            absolute=absolute,
            relative=relative,
            distillation=distillation,
            temperature=temperature,
        )
        self._follow()

    def _term(
        self,
        losses: Tensor,
        *,
        labels: Tensor,
        logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = self._embeddings(losses)
        labels = self._labels(labels, embeddings)
        absolute, relative = text_distance(embeddings, labels, *self._tables(embeddings))
        parts = {"absolute": (self.absolute, absolute)}
        if self.anchors.shape[1]:
            parts["relative"] = (self.relative, relative)
        if teacher_logits is not None:
            parts["distillation"] = (
                self.distillation,
                self._distillation(losses, logits, teacher_logits),
            )
        # What has no weight stays out: 0 * inf is NaN
        weighted = [weight * values for weight, values in parts.values() if weight > 0]
        total = sum(weighted[1:], weighted[0]) if weighted else torch.zeros_like(absolute)
        if not total.requires_grad:  # where all it depends on is frozen; a backward starts here
            total.requires_grad_()
        statistics = {f"rise_{key}": values.detach().mean() for key, (_, values) in parts.items()}
        return total, statistics

    # -- inputs --

    def _embeddings(self, losses: Tensor) -> Tensor:
        """What the module gave in the forward of these losses."""
        forward, self._seen = self._seen, None
        name = type(self.embedding).__name__
        if forward is None:
            raise RuntimeError(
                f"embedding: the module {name} has not run, with gradients enabled, since the last "
                "backward; run the model that it belongs to, once for each backward (under "
                "activation checkpointing with use_reentrant=False: the reentrant kind runs it "
                "without gradients)"
            )
        E, seen = self.classes.shape[1], forward.output
        if not isinstance(seen, Tensor) or seen.dim() != 2 or seen.shape[1] != E:
            got = list(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
            raise ValueError(
                f"embedding: expected that the module {name} gives a tensor [N, {E}], as wide as "
                f"the texts' embeddings, got {got}"
            )
        if len(seen) != len(losses):
            raise ValueError(
                f"losses: expected one for each of the {len(seen)} embeddings of the last forward, "
                f"got {len(losses)}"
            )
        if len(known := found(losses, self)) > 1:
            raise RuntimeError(
                f"losses: {len(known)} forwards of the module {name} lead to them, and RISE would "
                "know the embeddings of the last only; call backward for each forward (with "
                "final=False for all but the last)"
            )
        if known and forward.token not in known:
            raise RuntimeError(
                f"losses: they come from an earlier forward of the module {name}, not the last, "
                "whose embeddings would be taken for theirs; call backward (with final=False, if "
                "more are to come) before the model runs again"
            )
        if forward.version is not None and version_of(seen) != forward.version:
            raise RuntimeError(
                f"embedding: the output of the module {name} is changed in place after it (an "
                "activation with inplace=True, or +=); name the module that does so in its place, "
                "or make that operation out of place"
            )
        return to_statistics_dtype(seen)

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.classes.device != like.device or self.classes.dtype != like.dtype:
            self.classes, self.anchors, self.teacher = (
                x.to(like) for x in (self.classes, self.anchors, self.teacher)
            )
        return self.classes, self.anchors, self.teacher

    def _labels(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        C = len(self.classes)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or len(labels) != len(embeddings):
            got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels: expected a tensor [{len(embeddings)}], got {got}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels: expected integers, got {labels.dtype}")
        if labels.device.type != "cpu" and labels.device != embeddings.device:
            raise ValueError(
                f"labels: expected them on {embeddings.device}, as the embeddings, or on the CPU, "
                f"got {labels.device}"
            )
        if not readable(labels):  # there, without a wait
            inside = ((labels >= 0) & (labels < C)).all()
            assert_later(inside, f"labels: expected classes 0 to {C - 1}: those with texts")
        else:
            least, most = (int(x) for x in labels.aminmax())
            if least < 0 or most >= C:
                raise ValueError(
                    f"labels: expected classes 0 to {C - 1}, those with texts, got {least} to "
                    f"{most}"
                )
        return labels.detach().to(embeddings.device, torch.int64, non_blocking=True)

    def _distillation(self, losses: Tensor, logits: Tensor | None, teacher: Tensor) -> Tensor:
        shape = len(losses), len(self.classes)
        if logits is None:
            raise TypeError(
                "logits: RISE needs the model's with teacher_logits; pass logits=logits"
            )
        for name, given in (("logits", logits), ("teacher_logits", teacher)):
            if not isinstance(given, Tensor) or given.shape != shape:
                got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(
                    f"{name}: expected a tensor [{shape[0]}, {shape[1]}], samples and classes with "
                    f"texts, got {got}"
                )
        if teacher.device != logits.device:
            raise ValueError(
                f"teacher_logits: expected them on {logits.device}, as the logits, got "
                f"{teacher.device}; move the teacher, or what it returns"
            )
        cooled = to_statistics_dtype(teacher.detach()) / self.temperature
        student = F.log_softmax(to_statistics_dtype(logits) / self.temperature, 1)
        apart = F.kl_div(student, F.log_softmax(cooled, 1), reduction="none", log_target=True)
        return apart.sum(1) * self.temperature**2

    # -- the module --

    def _follow(self) -> None:
        """Take what the module gives from now on, for as long as this wrapper lives."""
        self._seen = None
        handle = self.embedding.register_forward_hook(Hook(self, "_see"))
        weakref.finalize(self, handle.remove).atexit = False

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # In a backward it is a checkpoint that runs the module again
        if not recording() or in_backward():
            return
        self._seen = Forward(output)
        if isinstance(output, Tensor) and output.requires_grad:
            self._seen.version = version_of(output)
            mark(output, self, self._seen.token)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()

    def settings(self) -> dict[str, Any]:
        own = {
            "embedding": type(self.embedding).__name__,
            "classes": len(self.classes),
            "anchors": self.anchors.shape[1],
        }
        return {**own, **super().settings()}


def _units(classes: Tensor, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both tables with rows of length 1; no anchors are ``[C, 0, E]``."""
    for name, table, dims, shape in (
        ("classes", classes, 2, "[C, E]"),
        ("anchors", anchors, 3, "[C, A, E]"),
    ):
        if name == "anchors" and table is None:
            continue
        if not isinstance(table, Tensor) or not table.is_floating_point():
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(
                f"{name}: expected a floating-point tensor {shape}, got {got}; "
                "fastdg.text_tables makes both: RISE(base, embedding, *tables)"
            )
        if table.dim() != dims or 0 in table.shape:
            raise ValueError(f"{name}: expected a tensor {shape}, got {list(table.shape)}")
    C, E = classes.shape
    if anchors is None:
        anchors = classes.new_zeros((C, 0, E))
    elif anchors.shape[0] != C or anchors.shape[2] != E:
        raise ValueError(
            f"anchors: expected [{C}, A, {E}], as classes is [{C}, {E}], got {list(anchors.shape)}"
        )
    classes = to_statistics_dtype(classes.detach())
    anchors = to_statistics_dtype(anchors.detach()).to(classes)
    for name, table in (("classes", classes), ("anchors", anchors)):
        length = table.norm(dim=-1)
        bad = ~((length > 0) & length.isfinite())
        for place in bad.nonzero().tolist():
            where = f"class {place[0]}" + (f", anchor {place[1]}," if len(place) > 1 else "")
            raise ValueError(
                f"{name}: {where} has no text: its embedding is all zeros, or not finite"
            )
    return F.normalize(classes, dim=1), F.normalize(anchors, dim=2)
