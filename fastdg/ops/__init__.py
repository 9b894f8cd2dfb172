"""The ops: ``torch.ops.fastdg.*``, one file each; `fastdg.ops.dispatch.registry` routes a call."""

from .agreement import agreement
from .combine import combine
from .combine_rows import combine_rows
from .foreach_moments import foreach_moments
from .gram import gram
from .meta_step import meta_step
from .moments import moments
from .norm_gradients import norm_gradients
from .oracle_nll import oracle_nll
from .outer_agreement import outer_agreement
from .outer_domain import outer_domain
from .outer_gram import outer_gram
from .outer_moments import outer_moments
from .outer_norms import outer_norms
from .text_distance import text_distance
from .variance_gap import variance_gap

from .dispatch.backends import backends, use_backend  # isort: skip  (attaches to the ops above)

__all__ = [
    "agreement",
    "backends",
    "combine",
    "combine_rows",
    "foreach_moments",
    "gram",
    "meta_step",
    "moments",
    "norm_gradients",
    "oracle_nll",
    "outer_agreement",
    "outer_domain",
    "outer_gram",
    "outer_moments",
    "outer_norms",
    "text_distance",
    "use_backend",
    "variance_gap",
]
