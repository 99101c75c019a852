"""The backends of `mask_head` and the order in which "auto" tries them."""

from ..registry import declare
from . import cpu, cuda, reference, triton

BACKENDS = declare("mask_head", "PAGE4D_MASK_HEAD", order=("cpu", "reference"))
for _module in (reference, cpu, triton, cuda):
    BACKENDS.register(_module.BACKEND)
