"""Our compiled CPU kernel (csrc/cpu/rope.h). Backward: the reference's formulas."""

from __future__ import annotations

from ... import native
from ...reference.qk_norm_rope import qk_norm_rope_backward
from .. import native_limits
from ..registry import Backend
from . import compiled

BACKEND = Backend(
    "cpu",
    "our compiled kernel; backward by PyTorch",
    compiled.forward("qk_norm_rope", native.common),
    qk_norm_rope_backward,
    why_not=native_limits.limits,
    missing=native_limits.missing,
    passed_over=native_limits.plain_loops,
)
