"""The backends of `mask_head` and the order in which "auto" tries them."""

from ..registry import Registry
from . import reference

BACKENDS = Registry("mask_head", "PAGE4D_MASK_HEAD", order=("reference",))
BACKENDS.register(reference.BACKEND)
