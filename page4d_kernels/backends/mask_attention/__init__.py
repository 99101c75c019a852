"""The backends of `mask_attention` and the order in which "auto" tries them.

triton, cuda, flash, xformers and sdpa_* are not in that order. "auto" takes them where they have qualified: docs/qualification.md.
"""

from ..registry import declare
from . import chunked, cpu, cuda, flash, flex, reference, sdpa, sdpa_augmented, sdpa_kernels, sdpa_rows, triton, xformers
from .problem import AttentionProblem

BACKENDS = declare(
    "mask_attention", "PAGE4D_ATTN", order=("cpu", "sdpa", "chunked"), safe=("sdpa", "chunked"), typical=AttentionProblem.typical
)
for _module in (reference, chunked, cpu, sdpa, sdpa_augmented, triton, cuda, flex, flash, xformers, sdpa_rows):
    BACKENDS.register(_module.BACKEND)
for _backend in sdpa_kernels.BACKENDS:
    BACKENDS.register(_backend)
