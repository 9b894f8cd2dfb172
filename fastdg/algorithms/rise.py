"""RISE: let images be where a teacher sees the words for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..capture.module_output import ModuleOutput
from ..capture.text_targets import check_logits, class_ids, unit_tables
from ..core.hyper import argument, check_module, check_steepness, check_weight, hyper, type_name
from ..core.term import Term
from ..dtypes import to_statistics_dtype
from ..ops import text_distance


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
    classes' texts, K embeddings of anchors: texts of each class in each domain. The losses have
    weight 1. The paper weights the cross-entropy too (by 0.1 on PACS and VLCS, where the other
    weights are the defaults): pass ``0.1 * losses``, which means the same under every algorithm
    around this term.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or another term.
        embedding: the module whose output is s ``[N, E]``, E as of the texts (in the paper a linear
            layer after the backbone, and the classifier starts as the texts themselves).
        classes: ``[C, E]``, text embeddings of the classes in the order of the labels, of any
            length; see `text_tables`.
        anchors: ``[C, A, E]``; None: no relative distance.
        absolute, relative, distillation: the weights :math:`w`.
        temperature: :math:`\tau`.
        num_domains: D; default: as many as have been seen.
        model: its parameters' names are used in messages.

    `backward` takes three more inputs by name, and a closure of `step` returns them as a third,
    ``(losses, domains, dict(labels=labels))``:

    - ``labels``: class y of each sample ``[N]``, on the device of ``losses`` or the CPU.
    - ``logits``: z ``[N, C]``, with their graph; needed with ``teacher_logits`` only.
    - ``teacher_logits``: t ``[N, C]``: 100 times the cosines of the teacher's image embeddings with
      the class texts; of several teachers, `mix_teachers` of theirs. None: no distillation.

    The weights and the temperature live in ``param_groups[0]`` (as ``rise_absolute`` and so on).
    ``statistics`` holds ``loss``, ``objective``, ``domain_loss``, ``domain_count``, and, without
    their weights, ``rise_absolute``, ``rise_relative`` (with anchors) and ``rise_distillation``
    (with a teacher), 0-dim and detached.

    Raises:
        TypeError, ValueError: an argument is not as described; a class without text is named.

    Reference:
        Huang et al.: A Sentence Speaks a Thousand Images: Domain Generalization through Distilling
        CLIP with Language Guidance, ICCV 2023. The defaults are of its search on PACS.

    Example:
        >>> tables = fastdg.text_tables(class_names, domain_names, "openai/clip-vit-base-patch32")
        >>> opt = fastdg.RISE(torch.optim.SGD(model.parameters(), lr=1e-3), model.embed, *tables)
        >>> opt.zero_grad(); logits = model(x)
        >>> losses = 0.1 * F.cross_entropy(logits, y, reduction="none")
        >>> opt.backward(losses, domains, labels=y, logits=logits, teacher_logits=teacher(x))
        >>> opt.step()
    """

    prefix = "rise"
    _transient = (*Term._transient, "_output")

    embedding: nn.Module = argument(check_module, kw_only=False, show=type_name)
    classes: Tensor = argument(kw_only=False, show=len)
    anchors: Tensor | None = argument(default=None, kw_only=False, show=lambda x: x.shape[1])
    absolute: float = hyper(1.0, check_weight)
    relative: float = hyper(1.0, check_weight)
    distillation: float = hyper(0.9, check_weight)
    temperature: float = hyper(3.0, check_steepness)

    def _start(self) -> None:
        self.classes, self.anchors = unit_tables(self.classes, self.anchors)
        self.teacher = (self.anchors @ self.classes.unsqueeze(2)).squeeze(2).softmax(1)

    def _follow(self) -> None:
        self._output = ModuleOutput(self.embedding, type(self).__name__)

    def sample_penalty(
        self,
        losses: Tensor,
        *,
        labels: Tensor,
        logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = self._output.of(losses, self.classes.shape[1])
        labels = class_ids(labels, embeddings, len(self.classes))
        tables: Any = self.classes, self.anchors, self.teacher
        self.classes, self.anchors, self.teacher = tables = [x.to(embeddings) for x in tables]
        absolute, relative = text_distance(embeddings, labels, *tables)
        parts = {"absolute": (self.absolute, absolute)}
        if tables[1].shape[1]:
            parts["relative"] = (self.relative, relative)
        if teacher_logits is not None:
            distilled = self._distillation(losses, logits, teacher_logits)
            parts["distillation"] = (self.distillation, distilled)
        return self.weighted(parts)

    def _distillation(self, losses: Tensor, logits: Tensor | None, teacher: Tensor) -> Tensor:
        logits = check_logits(logits, teacher, (len(losses), len(self.classes)))
        cooled = to_statistics_dtype(teacher.detach()) / self.temperature
        student = F.log_softmax(to_statistics_dtype(logits) / self.temperature, 1)
        apart = F.kl_div(student, F.log_softmax(cooled, 1), reduction="none", log_target=True)
        return apart.sum(1) * self.temperature**2
