"""Fish: steps on one domain after the other, then a part of the way."""

from __future__ import annotations

from torch import Tensor

from ...averaging.anchored import Anchored
from ...core.hyper import argument, check_steps, check_switch, check_weight, fixed, hyper, option


class Fish(Anchored):
    r"""Gradient matching by an inner loop over domains, and a step towards where it ends.

    .. math::
        \tilde\theta \leftarrow \text{base step on } \nabla\ell_d(\tilde\theta)
        \quad\text{for one domain } d \text{ after the other}, \qquad
        \theta \leftarrow \theta + \epsilon\,(\tilde\theta-\theta)

    To first order this climbs the inner products between the domains' gradients. The training loop
    is an ordinary one over batches of a single domain: each ``opt.step()`` is an inner step, and
    every ``meta_steps``-th also takes the meta step, in place. One copy of the weights is kept;
    the wrapped optimizer's state goes on through all steps, as in DomainBed. An inner step that a
    ``torch.amp.GradScaler`` skips has no length; a last one still takes the meta step.

    ``opt.step(closure)`` makes a whole meta-iteration: ``closure(d)`` runs the model on domain d
    and returns its losses, or ``(losses, domains)``, for d from 0 to ``meta_steps - 1``. ``.grad``
    is cleared before each call; the result is the mean of the inner steps' mean losses, and
    ``statistics`` covers all of them. A closure without a parameter makes one inner step.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        meta_lr: :math:`\epsilon`, as in DomainBed; the paper's code divides its own by the steps.
        num_domains: number of training domains D.
        meta_steps: inner steps of a meta-iteration; default ``num_domains``. The training loop
            chooses their domains and the order.
        inner_product: also sum the gain of each domain from the steps on earlier domains, at the
            cost of reading gradients, weights and kept weights in every inner step.
        model: interpolate this model's buffers too (running statistics), as DomainBed does: numeric
            buffers in its ``state_dict()``; integers are truncated. A meta-iteration begins with
            the buffers before its first call with gradients enabled. For a compiled model, pass the
            result of ``torch.compile``.

    ``meta_lr`` and ``meta_steps`` are in ``param_groups[0]`` (as ``fish_meta_lr`` and so on). The
    position in the meta-iteration and the kept weights are in ``state_dict``: a run that resumes
    within one continues bit for bit.

    If weights are changed from outside between two meta-iterations (by ``load_state_dict``, by
    another optimizer), the next one starts there; autograd's version counters show it, except for
    changes through ``.data``. Changes within a meta-iteration count as a part of its steps.

    ``statistics`` holds ``loss`` (0-dim), ``domain_loss`` (``[D]``, NaN where there was no sample)
    and ``domain_count`` (``[D]``) of the inner step, and from the first meta step on, of the
    last one, ``trajectory``, :math:`|\tilde\theta-\theta|^2`, and with ``inner_product=True``
    ``inner_product``, :math:`-\sum_d\langle\nabla\ell_d(\tilde\theta_d),\tilde\theta_d-\theta
    \rangle`: how far, to first order, the inner steps before d have brought its loss down (NaN of
    a meta-iteration that was resumed). For plain SGD with rate r that is r times the sum of the
    inner products of all pairs of gradients, for which also :math:`\sum_{i<j}\langle g_i,g_j\rangle
    = (|\tilde\theta-\theta|^2/r^2-\sum_d|g_d|^2)/2`. The products of the domains' gradients at one
    point are ``fastdg.domain_gram(opt.tape, losses, domains)`` on a mixed batch.

    Raises:
        TypeError, ValueError: an argument is not as described; a batch with samples of several
            domains.

    Reference:
        Shi, Seely, Torr, Siddharth, Hannun, Usunier, Synnaeve: Gradient Matching for Domain
        Generalization, ICLR 2022.

    Example:
        >>> opt = fastdg.Fish(torch.optim.Adam(model.parameters()), num_domains=3, model=model)
        >>> for d, (x, y) in enumerate(batches):            # one of each domain
        ...     losses = F.cross_entropy(model(x), y, reduction="none")
        ...     opt.zero_grad(); opt.backward(losses, torch.full_like(y, d)); opt.step()
    """

    prefix = "fish"
    penalises = False
    check: bool = fixed(True, init=False)

    meta_lr: float = hyper(0.5, check_weight)
    meta_steps: int = hyper(None, check_steps, fill=lambda opt: opt.num_domains)
    inner_product: bool = option(False, check_switch)
    num_domains: int = argument(check_steps, kw_only=True)

    def inner_steps(self) -> int:
        return self.meta_steps

    def meta_step(self) -> dict[str, Tensor]:
        found = {"trajectory": self.interpolate(self.meta_lr)}
        return found if self._gains is None else {**found, "inner_product": self._gains}

    @property
    def _reads_grad(self) -> bool:  # type: ignore[override]
        return self.inner_product
