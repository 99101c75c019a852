"""Our Triton kernels. Not yet run on a GPU: held by the interpreter and by ahead-of-time compilation, and not taken by "auto"."""

from __future__ import annotations

from .. import triton_limits
from ..registry import Backend

BACKEND = Backend(
    "triton",
    "one pass over the projection; not yet run on a GPU",
    triton_limits.launch("qk_norm_rope", "forward"),
    triton_limits.launch("qk_norm_rope", "backward"),
    why_not=triton_limits.limits,
    missing=triton_limits.missing,
)
