"""PGrad: a step along the principal directions of a walk over the domains."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...averaging.walk import Walk
from ...core.hyper import argument, check_steps, check_weight, fixed, hyper


class PGrad(Walk):
    r"""Learning principal gradients: steps on one part of a domain's batch after the other, and a
    step along the principal directions of the points on the way.

    .. math::
        \theta_{k+1} = \text{base step on } \nabla\ell_{d_k}(\theta_k), \quad
        k < T = \text{splits}\cdot D, \qquad
        X = (\theta_0, \dots, \theta_T) - \text{their mean}, \quad
        X X^\top = U \Lambda U^\top

    .. math::
        \theta \leftarrow \theta_0 - \eta\Bigl(\lVert\theta_0-\theta_T\rVert
        \sum_{k\le K} \frac{\lambda_k}{\lVert\lambda_{1:K}\rVert}\,
        \pm\frac{X^\top u_k}{\lVert X^\top u_k\rVert} + w\,\theta_0\Bigr)

    with the sign that makes the direction go with :math:`\theta_0-\theta_T`. The decomposition is
    that of the Gram matrix ``[T, T]`` of the points; no vector of the weights' size is decomposed.
    Directions of a length that is 0 to rounding are left out.

    The training loop is an ordinary one over batches of a single domain, T of them for a round;
    the last step also takes the meta step, in place. ``opt.order()`` draws their domains as the
    authors do: each domain once in each of ``splits`` turns, shuffled for each turn. Or
    ``opt.step(closure)`` makes a whole round: ``closure(d)`` runs the model on the next part of
    domain d's batch, as in `Fish`. The state of the optimizer inside goes on through all steps.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        num_domains: number of training domains D.
        splits: parts of each domain's batch. A change holds from the next round on.
        meta_lr: :math:`\eta`, in the authors' code that of a plain SGD.
        directions: K.
        weight_decay: w, of the meta step. (The authors' inner optimizer has none.)
        generator: draws `order`. Its state is kept in ``state_dict`` and restored by loading.
            Default: torch's own.
        model: interpolate this model's buffers, too (running statistics), as in `Fish`. The
            authors' code drops them.

    Defaults are the authors'. The points are in ``state_dict``, T copies of the weights: a run that
    is resumed in the middle of a round goes on bit for bit. Not for ``fully_shard``.

    ``statistics`` holds ``loss``, ``domain_loss`` and ``domain_count`` of the inner step, and from
    the first meta step on those of the last one: ``gram`` of the changes of the weights
    :math:`\theta_k-\theta_0` ``[T, T]``, their ``weights`` ``[T]`` in the direction, and
    ``trajectory``, the squared length of the direction plus :math:`w\theta_0`. On CUDA the
    decomposition waits for the device, once in a round.

    Raises:
        TypeError, ValueError: an argument is not as described; a batch has several domains.

    Reference:
        Wang, Grigsby, Qi: PGrad: Learning Principal Gradients for Domain Generalization, ICLR 2023.
    """

    prefix = "pgrad"
    penalises = False
    check: bool = fixed(True, init=False)

    meta_lr: float = hyper(0.1, check_weight)
    splits: int = hyper(3, check_steps)
    directions: int = hyper(4, check_steps)
    weight_decay: float = hyper(0.0, check_weight)
    num_domains: int = argument(check_steps, kw_only=True)

    @torch.no_grad()
    def meta_step(self) -> dict[str, Tensor]:
        for p, start in self.kept.items():
            p.copy_(start).sub_(start, alpha=self.weight_decay)
        return self.follow(self.changes, self.principal, self.meta_lr)

    def principal(self, gram: Tensor) -> Tensor:
        """Return the weights of the changes ``[T]``, given their Gram matrix ``[T, T]``."""
        finite = gram.isfinite().all()
        # The first point is no change
        products = F.pad(gram.double().where(finite, 0.0), (1, 0, 1, 0))
        noise = len(products) * torch.finfo(gram.dtype).eps
        one = torch.eye(len(products), dtype=products.dtype, device=products.device)
        centring = one - 1 / len(products)
        values, vectors = torch.linalg.eigh(centring @ products @ centring)
        values, vectors = values[-self.directions :].clamp(min=0), vectors[:, -self.directions :]
        kept = values > noise * values[-1]
        share = values / values.norm() * products[-1, -1].sqrt() / values.sqrt()
        along = (products[-1] @ vectors).sign()  # how the direction goes with the whole way
        weights = vectors @ torch.where(kept, share * along, 0.0)
        return weights[1:].where(finite, torch.nan).to(gram.dtype)
