"""SAM and ASAM: the gradient at the worst weights near by."""

from __future__ import annotations

from torch import Tensor

from ...core.hyper import check_switch, check_weight, hyper
from ...outer.ascent import Ascent, Offsets
from ...outer.vector import TINY, Vector


class SAM(Ascent):
    r"""Sharpness-aware minimization: a step along the gradient at the worst weights near by.

    .. math::
        g = \nabla L(\theta), \qquad e = \rho\,\frac{g}{\lVert g\rVert}, \qquad
        \nabla = \nabla L(\theta + e)

    and with ``adaptive=True`` (ASAM), entry by entry,

    .. math:: e = \rho\,\frac{\theta^2 g}{\lVert\,|\theta|\,g\,\rVert}

    The norm is over all of the optimizer's parameters that have a gradient. There are two ways to
    make a step. ``opt.step(closure)`` calls the closure twice; it returns ``(losses, domains)``, or
    calls ``opt.backward`` itself. Or:

        >>> opt.zero_grad(); opt.backward(losses, domains)     # at theta
        >>> opt.ascend(); opt.backward(losses_of_a_second_forward, domains)
        >>> opt.step()

    The second `backward` puts the weights back, bit for bit, so ``.grad`` may be clipped or
    unscaled as ever. Micro-batches (``final=False``), a ``GradScaler``, DistributedDataParallel and
    FSDP2 work as with every wrapper; the norm is of the whole batch's gradient, over all ranks.

    If a loop skips a batch after an error between the two calls, ``opt.restore()`` puts the weights
    back. Under a ``GradScaler``, call ``scaler.unscale_`` after the last `backward`.

    SAM goes around an algorithm, too: ``fastdg.SAM(fastdg.Fishr(optimizer))`` takes Fishr's
    gradient at both weights, and Fishr's history follows the second forward.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, a term, or an algorithm.
        rho: :math:`\rho`; the paper's 0.05 for ResNets. ASAM's is about ten times as large.
        adaptive: whether e is scaled by the weights, as in ASAM. The ASAM paper adds a constant to
            :math:`|\theta|` that the common code, as this, leaves out.
        buffers: ``"first"``: only the forward at :math:`\theta` moves buffers of modules, such as
            the running statistics of batch norm; ``"all"``: every forward does.
        num_domains: D, for the algorithm inside, or for ``statistics``.
        model: the buffers that ``"first"`` is about; its parameters' names are used in messages.
            Without it they are found by hooks on all modules that run between two gradients, which
            ``torch.compile`` warns of; so are those of ``torch.func.functional_call``.

    ``statistics`` holds the entries of the algorithm inside (or of `ERM`) at :math:`\theta`,
    ``ascended_loss``, the mean loss at :math:`\theta + e`, and ``gradient_norm``,
    :math:`\lVert g\rVert`; all 0-dim but the ``domain_`` entries.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving
        Generalization, ICLR 2021. Kwon, Kim, Park, Choi: ASAM: Adaptive Sharpness-Aware
        Minimization for Scale-Invariant Learning of Deep Neural Networks, ICML 2021.

    Example:
        >>> opt = fastdg.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> def closure():
        ...     return F.cross_entropy(model(x), y, reduction="none"), domains
        >>> opt.zero_grad(); opt.step(closure)
    """

    prefix = "sam"

    rho: float = hyper(0.05, check_weight)
    adaptive: bool = hyper(False, check_switch)

    def offsets(self, gradient: Vector) -> Offsets:
        return (yield self.worst(gradient))

    def worst(self, gradient: Vector) -> Vector:
        """Return the offset e."""
        if not self.adaptive:
            return self.rho * gradient.unit()

        def scaled(p: Tensor, g: Tensor) -> Tensor:
            return p.abs() * g

        scaled_gradient = gradient.map(scaled)
        return self.rho / (scaled_gradient.norm() + TINY) * scaled_gradient.map(scaled)
