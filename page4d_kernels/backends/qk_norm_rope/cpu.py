"""Our compiled CPU kernel (csrc/cpu/rope.h). Backward: the reference's formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...reference.qk_norm_rope import qk_norm_rope_backward
from .. import native_limits
from ..registry import Backend


def _forward(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: tuple[int, int],
    special_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    q, k = (torch.empty(batch, heads, tokens, head_dim, dtype=qkv.dtype) for _ in range(2))
    vectors = [native.fp32(x) for x in (q_weight, q_bias, k_weight, k_bias, cos, sin)]
    native.library().qk_norm_rope(
        qkv.data_ptr(), [x.data_ptr() for x in vectors], q.data_ptr(), k.data_ptr(),
        (batch, tokens, heads, head_dim, special_tokens + grid[0] * grid[1], special_tokens, grid[1]),
        (qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3)), eps, *native.common(qkv),
    )  # fmt: skip
    return q, k


BACKEND = Backend(
    "cpu",
    "our compiled kernel; backward by PyTorch",
    _forward,
    qk_norm_rope_backward,
    why_not=native_limits.limits,
    missing=native_limits.missing,
    passed_over=native_limits.plain_loops,
)
