"""Our compiled CPU kernel (csrc/cpu/rope.h). Backward: the reference's formulas."""

from __future__ import annotations

from ... import native
from ...reference.qk_norm_rope import qk_norm_rope_backward
from .. import native_common
from ..registry import Backend
from . import compiled

BACKEND = Backend(
    "cpu",
    "our compiled kernel; backward by PyTorch",
    compiled.forward("qk_norm_rope", native.cpu_launch_args),
    qk_norm_rope_backward,
    unsupported=native_common.unsupported,
    unavailable=native_common.unavailable,
    auto_skips=native_common.no_vector_level,
)
