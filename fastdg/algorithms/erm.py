"""ERM: plain training, in the loop of the algorithms."""

from __future__ import annotations

from ..core.optimizer import DomainOptimizer


class ERM(DomainOptimizer):
    r"""Empirical risk minimisation, the baseline: ``objective = mean loss``.

    .. math:: \nabla = \tfrac1N \sum_i \nabla \ell_i

    The gradient equals ``losses.mean().backward()``'s, from one plain backward. All other parts of
    the loop (micro-batches, a ``GradScaler``, several ranks, closures, checkpoints) work as with
    every algorithm, so a comparison changes one line.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a term.
        num_domains: D, for ``statistics``; default: as many as the batch has.
        model: its parameters' names are used in messages.

    ``statistics`` holds ``loss`` (0-dim), ``domain_loss`` (``[D]``, NaN for an empty domain) and
    ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Vapnik: Statistical Learning Theory, 1998. Gulrajani, Lopez-Paz: In Search of Lost Domain
        Generalization, ICLR 2021, for how far it goes.

    Example:
        >>> opt = fastdg.ERM(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "erm"
    penalises = False
    looks_at_samples = False
