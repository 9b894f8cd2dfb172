"""Triton kernels, one file per op, each under the name of its op in ``fastdg.ops``.

In a clone the kernels' files are in the top-level folder ``kernels/``; an install has them beside
this one. The folder has no ``__init__.py``, so that Python started in the clone's root never
imports it in place of the package ``kernels`` that transformers and others look for.

``variance_gap`` is a CUDA op. ``outer_gram`` has no kernel of its own: its reference is
``outer_domain`` and one matrix product, which run on the device without waiting for it.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "launch.py").exists():  # a clone
    __path__.append(str(_HERE.parents[1] / "kernels"))

from ..ops.dispatch.registry import attach  # noqa: E402
from . import (  # noqa: E402
    foreach_moments,
    launch,
    moments,
    norm_gradients,
    oracle_nll,
    outer_agreement,
    outer_domain,
    outer_moments,
    outer_moments_backward,
    outer_norms,
    text_distance,
)


def attach_all() -> None:
    """Let Triton compute what is here, for the arguments that each op's kernels support."""
    plain, outer = launch.supports, launch.supports_outer
    grouped = foreach_moments.foreach_moments
    attach("foreach_moments", "triton", grouped, foreach_moments.supports_lists)
    attach("moments", "triton", moments.moments, plain)
    attach("moments_backward", "triton", moments.moments_backward, plain)
    norms = norm_gradients
    attach("norm_gradients", "triton", norms.norm_gradients, norms.supports)
    attach("norm_gradients_backward", "triton", norms.norm_gradients_backward, norms.supports)
    attach("oracle_nll", "triton", oracle_nll.oracle_nll, oracle_nll.supports)
    attach("oracle_nll_backward", "triton", oracle_nll.oracle_nll_backward, oracle_nll.supports)
    attach("outer_agreement", "triton", outer_agreement.outer_agreement, launch.supports_weighted)
    attach("outer_domain", "triton", outer_domain.outer_domain, outer)
    attach("outer_moments", "triton", outer_moments.outer_moments, outer)
    attach("outer_norms", "triton", outer_norms.outer_norms, outer)
    attach("text_distance", "triton", text_distance.text_distance, plain)
    attach("text_distance_backward", "triton", text_distance.text_distance_backward, plain)
    attach(
        "outer_moments_backward",
        "triton",
        outer_moments_backward.outer_moments_backward,
        lambda grad_mean, grad_variance, *args: outer(*args) and plain(grad_mean, grad_variance),
    )
