"""The backends of `mask_attention` and the order in which "auto" tries them.

triton, cuda, flash, xformers and flex are not in that order, because they have not yet been run on a GPU from this repository. To use one,
name it.
"""

from ..registry import declare
from . import chunked, cpu, cuda, flash, flex, reference, sdpa, sdpa_augmented, triton, xformers
from .problem import AttentionProblem

BACKENDS = declare("mask_attention", "PAGE4D_ATTN", order=("cpu", "sdpa", "chunked"), typical=AttentionProblem.typical)
for _module in (reference, chunked, cpu, sdpa, sdpa_augmented, triton, cuda, flex, flash, xformers):
    BACKENDS.register(_module.BACKEND)
