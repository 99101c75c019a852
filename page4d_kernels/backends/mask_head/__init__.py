"""The backends of `mask_head` and the order in which "auto" tries them."""

from ..registry import declare
from . import cpu, cuda, reference, triton
from .problem import MaskHeadProblem

BACKENDS = declare("mask_head", "PAGE4D_MASK_HEAD", order=("cpu", "reference"), safe=("reference",), typical=MaskHeadProblem.typical)
for _module in (reference, cpu, triton, cuda):
    BACKENDS.register(_module.BACKEND)
