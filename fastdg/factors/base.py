"""Per-sample gradients of a parameter, and their dense form.

A `PerSampleGrad` computes every statistic, and forms single gradients only if it must.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .. import ops
from ..domains import Partition, single
from ..dtypes import to_operand_dtype, to_statistics_dtype


def flat(grads: Tensor) -> Tensor:
    """Flatten ``[N, *shape]`` to ``[N, numel]``; a scalar parameter has ``[N]``."""
    return grads.flatten(1) if grads.dim() > 1 else grads.unsqueeze(1)


def shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """View ``x`` in ``shape``; itself if it has it, as autograd records a view."""
    return x if x.shape == shape else x.view(shape)


class Agreement(NamedTuple):
    """The result of `ops.agreement` for one parameter.

    Attributes:
        combined: weighted sum of the domains' gradients times the mask, of the parameter's shape.
        agreeing: sum of the mask, 0-dim.
        magnitude: sum of ``combined.abs()``, 0-dim.
    """

    combined: Tensor
    agreeing: Tensor
    magnitude: Tensor


def agreement_of(
    rows: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float
) -> Agreement:
    """Call `ops.agreement` on one parameter's gradients, one for each domain."""
    (combined,), agreeing, magnitude = ops.agreement(
        [[row] for row in rows], weights, threshold, steepness
    )
    return Agreement(combined, agreeing[0], magnitude[0])


class PerSampleGrad(ABC):
    """Gradients :math:`g_1..g_N` of one parameter of shape ``shape``."""

    shape: Sequence[int]
    samples: int

    @abstractmethod
    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        """Compute mean and biased variance of each domain, ``[D, *shape]`` each; differentiable."""

    @abstractmethod
    def domain(self, partition: Partition) -> Tensor:
        """Compute the mean gradient of each domain, ``[D, *shape]``."""

    @abstractmethod
    def per_sample(self) -> Tensor:
        """Compute the gradients, ``[N, *shape]``."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Compute the squared norms, ``[N]``."""

    @abstractmethod
    def scaled(self, weights: Tensor) -> PerSampleGrad:
        """Multiply the gradients by ``weights [N]``."""

    @abstractmethod
    def take(self, number: slice) -> PerSampleGrad:
        """Select the gradients of some samples."""

    @abstractmethod
    def fold(self, samples: int) -> PerSampleGrad:
        """Sum over rows that were folded into the batch (sample-major): ``[k * N] -> [N]``."""

    def gram(self, partition: Partition) -> Tensor:
        """Compute inner products of the domains' mean gradients, ``[D, D]``."""
        rows = flat(self.domain(partition))
        return rows @ rows.t()

    def products(self, directions: Tensor) -> Tensor:
        """Compute inner products with ``directions [K, *shape]``, ``[N, K]``."""
        rows = flat(to_statistics_dtype(self.per_sample()))
        return rows @ flat(directions.to(rows.dtype)).t()

    def sample_gram(self) -> Tensor:
        """Compute inner products of the samples' gradients, ``[N, N]``."""
        rows = flat(to_statistics_dtype(self.per_sample()))
        return rows @ rows.t()

    def forms_domains(self, domains: int) -> bool:
        """Return whether `agreement` computes the gradients of all ``domains`` first."""
        return True

    def agreement(
        self, partition: Partition, weights: Tensor, threshold: float, steepness: float
    ) -> Agreement:
        """Combine the domains' mean gradients where their signs agree, as `ops.agreement` does."""
        return agreement_of(self.domain(partition).unbind(), weights, threshold, steepness)

    def computed(self) -> PerSampleGrad:
        """Return the gradients in a form that holds no maps of an op that has yet to run."""
        return self

    def plus(self, other: PerSampleGrad) -> PerSampleGrad:
        """Add the gradients of another use of the parameter."""
        return Dense(self.per_sample() + other.per_sample())


class Dense(PerSampleGrad):
    """Gradients in full: of biases, norm weights and other small parameters.

    Args:
        grads: ``[N, *shape]``. Statistics of bfloat16 and float16 are float32.
    """

    def __init__(self, grads: Tensor) -> None:
        self.grads = to_operand_dtype(grads)
        self.shape, self.samples = grads.shape[1:], grads.shape[0]

    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        mean, variance = ops.moments(flat(self.grads), partition.order, partition.offsets)
        shape = (partition.num_domains, *self.shape)
        return shaped(mean, shape), shaped(variance, shape)

    def domain(self, partition: Partition) -> Tensor:
        # As products with 1: an index_add wakes torch's threads several times for few numbers
        rows = flat(self.grads).unsqueeze(1)
        ones = rows.new_ones(()).expand(len(rows), 1, 1)
        mean = ops.outer_domain(rows, ones, partition.order, partition.offsets)
        return mean.view(partition.num_domains, *self.shape)

    def per_sample(self) -> Tensor:
        return to_statistics_dtype(self.grads)

    def norms(self) -> Tensor:
        return flat(self.per_sample()).square().sum(1)

    def scaled(self, weights: Tensor) -> PerSampleGrad:
        return Dense(self.per_sample() * weights.view(-1, *([1] * len(self.shape))))

    def take(self, number: slice) -> PerSampleGrad:
        return Dense(self.grads[number])

    def fold(self, samples: int) -> PerSampleGrad:
        return Dense(self.per_sample().unflatten(0, (samples, -1)).sum(1))


def weighted_sum(factor: PerSampleGrad, weights: Tensor) -> Tensor:
    """Compute ``sum_i weights_i g_i``, of the parameter's shape."""
    everything = single(factor.samples, weights.device)
    return factor.scaled(weights).domain(everything)[0] * factor.samples
