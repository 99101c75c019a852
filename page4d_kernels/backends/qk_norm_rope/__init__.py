"""The backends of `qk_norm_rope` and the order in which "auto" tries them."""

from ..registry import Registry
from . import reference

BACKENDS = Registry("qk_norm_rope", "PAGE4D_QK_NORM_ROPE", order=("reference",))
BACKENDS.register(reference.BACKEND)
