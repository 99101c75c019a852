"""Our Triton kernels for the forward, the reference's formulas for the backward. Not yet run on a GPU, and not taken by "auto"."""

from __future__ import annotations

from ...reference.mask_head import mask_head_backward
from .. import triton_limits
from ..registry import Backend

BACKEND = Backend(
    "triton",
    "two passes over the tokens, backward by PyTorch; not yet run on a GPU",
    triton_limits.launch("mask_head", "forward"),
    mask_head_backward,
    why_not=triton_limits.limits,
    missing=triton_limits.missing,
)
