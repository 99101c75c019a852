"""The backends of `qk_norm_rope` and the order in which "auto" tries them."""

from ..registry import declare
from . import cpu, cuda, reference, triton
from .problem import QkNormRopeProblem

BACKENDS = declare(
    "qk_norm_rope", "PAGE4D_QK_NORM_ROPE", order=("cpu", "reference"), safe=("reference",), typical=QkNormRopeProblem.typical
)
for _module in (reference, cpu, triton, cuda):
    BACKENDS.register(_module.BACKEND)
