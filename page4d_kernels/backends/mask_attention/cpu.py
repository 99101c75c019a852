"""Our compiled CPU kernels (csrc/cpu/attention.h): AVX2, AVX-512, AVX-512 BF16 or AMX, whatever the processor has. Backward: chunked."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...layout import TokenLayout
from .. import native_limits
from ..registry import Backend
from . import chunked
from .problem import AttentionProblem


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    layout: TokenLayout | None,  # not needed: the kernel looks at each row's gate
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    out = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    vectors = [x if x is None or x.stride(1) == 1 else x.contiguous() for x in (query_gate, key_bias)]
    gate, bias = ((0, 0) if x is None else (x.data_ptr(), x.stride(0)) for x in vectors)
    native.library().mask_attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), gate[0], bias[0], out.data_ptr(), lse.data_ptr(),
        (batch, heads, queries, k.shape[2], head_dim), *map(_strides, (q, k, v, out)), gate[1], bias[1], scale, *native.common(q),
    )  # fmt: skip
    return out, lse


def _passed_over(problem: AttentionProblem) -> list[str]:
    """Where `sdpa` is as fast or faster; docs/cpu.md says what was measured and what only tried."""
    reasons = []
    if problem.needs_grad:
        reasons.append("the backward of sdpa is faster")
    if native.level() < native.LEVELS.index("avx512"):
        reasons.append("it is faster from AVX-512 on")
    if problem.dtype == torch.float32 and problem.keys < 512:
        reasons.append("in float32 it is faster from 512 keys on")
    return reasons


BACKEND = Backend(
    "cpu",
    "our compiled kernels, fp32 softmax; backward by chunked",
    _forward,
    chunked.BACKEND.backward,
    why_not=native_limits.limits,
    missing=native_limits.missing,
    passed_over=_passed_over,
)
