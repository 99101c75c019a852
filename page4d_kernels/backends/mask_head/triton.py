"""Our Triton kernels. Not yet run on a GPU, and not taken by "auto"."""

from __future__ import annotations

from .. import triton_limits
from ..registry import Backend

BACKEND = Backend(
    "triton",
    "two passes over the tokens, no copy of them; not yet run on a GPU",
    triton_limits.launch("mask_head", "forward"),
    triton_limits.launch("mask_head", "backward"),
    why_not=triton_limits.limits,
    missing=triton_limits.missing,
)
