"""Our CUDA kernel (csrc/cuda/qk_norm_rope.cu). Not yet run on a GPU, and not taken by "auto". Backward: the reference's formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...reference.qk_norm_rope import qk_norm_rope_backward
from .. import native_limits
from ..registry import Backend
from .problem import QkNormRopeProblem

HEAD_DIMS = (32, 64, 128)


def _why_not(problem: QkNormRopeProblem) -> list[str]:
    reasons = native_limits.cuda_limits(problem)
    if problem.head_dim not in HEAD_DIMS:
        reasons.append(f"it takes head dims {', '.join(map(str, HEAD_DIMS))}, not {problem.head_dim}")
    return reasons


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
    q, k = (torch.empty(batch, heads, tokens, head_dim, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    vectors = [native.fp32(x) for x in (q_weight, q_bias, k_weight, k_bias, cos, sin)]
    native.library().qk_norm_rope_cuda(
        qkv.data_ptr(), [x.data_ptr() for x in vectors], q.data_ptr(), k.data_ptr(),
        (batch, tokens, heads, head_dim, special_tokens + grid[0] * grid[1], special_tokens, grid[1]),
        (qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3)), eps,
        native.DTYPES[qkv.dtype], qkv.get_device(), torch.cuda.current_stream(qkv.device).cuda_stream,
    )  # fmt: skip
    return q, k


BACKEND = Backend(
    "cuda",
    "our CUDA kernel, sm_80 and newer; not yet run on a GPU; backward by PyTorch",
    _forward,
    qk_norm_rope_backward,
    why_not=_why_not,
    missing=native_limits.missing_cuda,
)
