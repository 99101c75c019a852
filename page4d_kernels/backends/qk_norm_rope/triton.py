"""Our Triton kernels. Not yet run on a GPU: held by the interpreter and by ahead-of-time compilation, and not taken by "auto"."""

from __future__ import annotations

from .. import triton_limits
from ..registry import Backend


def _forward(*args):
    from ...triton import qk_norm_rope_launch

    return qk_norm_rope_launch.forward(*args)


def _backward(*args):
    from ...triton import qk_norm_rope_launch

    return qk_norm_rope_launch.backward(*args)


BACKEND = Backend(
    "triton",
    "one pass over the projection; not yet run on a GPU",
    _forward,
    _backward,
    why_not=triton_limits.limits,
    missing=triton_limits.missing,
)
