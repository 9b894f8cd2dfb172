"""The ops: ``torch.ops.fastdg.*``, one file each; `fastdg.ops.dispatch.registry` routes a call."""

from .agreement import agreement as agreement
from .combine import combine as combine
from .combine_rows import combine_rows as combine_rows
from .foreach_moments import foreach_moments as foreach_moments
from .foreach_norm_gradients import foreach_norm_gradients as foreach_norm_gradients
from .gram import gram as gram
from .loss_sums import loss_sums as loss_sums
from .meta_step import meta_step as meta_step
from .moments import moments as moments
from .norm_gradients import norm_gradients as norm_gradients
from .oracle_nll import oracle_nll as oracle_nll
from .outer_agreement import outer_agreement as outer_agreement
from .outer_domain import outer_domain as outer_domain
from .outer_gram import outer_gram as outer_gram
from .outer_moments import outer_moments as outer_moments
from .outer_norms import outer_norms as outer_norms
from .second.activation_derivative import activation_derivative as activation_derivative
from .second.attention_maps import attention_maps as attention_maps
from .text_distance import text_distance as text_distance
from .variance_gap import variance_gap as variance_gap

# Attaches implementations to the ops above
from .dispatch.backends import backends as backends, use_backend as use_backend  # isort: skip
