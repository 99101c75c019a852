"""`qk_norm_rope`: q, k, v from the packed projection, with QK-norm and rotary embedding of q and k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.qk_norm_rope import BACKENDS
from ..backends.qk_norm_rope.problem import QkNormRopeProblem
from ._checks import expect_device, expect_floats, expect_frames, expect_tensor, without_autocast
from ._operator import operator


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    grid: tuple[int, int],
    special_tokens: int,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into heads, and apply QK-norm and 2-D rotary embedding:

        q = rope(LN(qkv[:, :, 0]; q_weight, q_bias)),   k = rope(LN(qkv[:, :, 1]; k_weight, k_bias)),   v = qkv[:, :, 2]

    LN runs over the head dimension D. rope rotates the first D/2 channels by the token's row and the last D/2 by its column. In each
    half, with a and b its first and second D/4 channels, (a, b) -> (a cos - b sin, b cos + a sin). Tokens are ordered by frame. In a
    frame the special tokens come first, at position 0, then the patches in row-major order, at (row + 1, column + 1). Differentiable in
    qkv and the parameters.

    Args:
        qkv: (B, N, 3, H, D) with N a multiple of special_tokens + h*w, D a multiple of 4, any strides with unit stride in D;
            float32, float16, bfloat16 or float64.
        q_weight, q_bias, k_weight, k_bias: (D,), shared by all heads.
        cos, sin: (positions, D/4), at least max(h, w) + 1 positions, from `page4d_kernels.rope_tables`.
        grid: patches per frame (h, w).
        special_tokens: tokens before the patches of each frame.
        eps: added to the variance.
        backend: a name; default `use_backend(..., op="qk_norm_rope")`, then PAGE4D_QK_NORM_ROPE, then automatic.

    Returns:
        q, k, v (B, H, N, D) in qkv's dtype, computed in fp32 (float64 for float64). v is a view of qkv.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit. BackendError: see `mask_attention`.

    Source: VGGT / PAGE-4D aggregator blocks; rotary embedding after RoFormer (arXiv 2104.09864).
    """
    _check(qkv, (q_weight, q_bias, k_weight, k_bias), cos, sin, grid, special_tokens)
    batch, tokens, _, heads, head_dim = qkv.shape
    inputs = (qkv, q_weight, q_bias, k_weight, k_bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    problem = QkNormRopeProblem(qkv.device.type, qkv.dtype, batch, tokens, heads, head_dim, grid, special_tokens, needs_grad)
    chosen = BACKENDS.choose(problem, backend)
    q, k = torch.ops.page4d.qk_norm_rope(*inputs, cos, sin, list(grid), special_tokens, eps, chosen.name)
    return q, k, qkv[:, :, 2].transpose(1, 2)


def _check(qkv: Tensor, parameters: tuple[Tensor, ...], cos: Tensor, sin: Tensor, grid: tuple[int, int], special_tokens: int) -> None:
    expect_tensor("qkv", qkv, 5, "(B, N, 3, H, D)")
    expect_floats("qk_norm_rope", qkv)
    head_dim = qkv.shape[-1]
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, D), not {tuple(qkv.shape)}")
    if head_dim % 4:
        raise ValueError(f"the head dim must be a multiple of 4 for 2-D RoPE, not {head_dim}")
    if qkv.stride(-1) != 1:
        raise ValueError(f"qkv must have unit stride in its last dimension, not {qkv.stride(-1)}")
    if 0 in qkv.shape:
        raise ValueError(f"no dimension may be empty: qkv {tuple(qkv.shape)}")
    for name, x in zip(("q_weight", "q_bias", "k_weight", "k_bias"), parameters, strict=True):
        expect_tensor(name, x, 1, "(D,)")
        expect_floats("qk_norm_rope", x)
        if x.shape[0] != head_dim:
            raise ValueError(f"{name} must have length {head_dim}, the head dim, not {x.shape[0]}")
        expect_device(name, x, "qkv", qkv)
    expect_frames(grid, special_tokens)
    per_frame = special_tokens + grid[0] * grid[1]
    if qkv.shape[1] % per_frame:
        raise ValueError(f"{qkv.shape[1]} tokens are not a multiple of {per_frame}, the tokens per frame of grid {tuple(grid)}")
    for name, x in (("cos", cos), ("sin", sin)):
        expect_tensor(name, x, 2, "(positions, D/4)")
        expect_floats("qk_norm_rope", x)
        if x.shape[0] <= max(grid) or x.shape[1] != head_dim // 4:
            raise ValueError(f"{name} must be (at least {max(grid) + 1}, {head_dim // 4}), not {tuple(x.shape)}")
        expect_device(name, x, "qkv", qkv)


@operator("qk_norm_rope")
def _op(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: Sequence[int],
    special_tokens: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    height, width = grid
    with without_autocast(qkv):
        q, k = BACKENDS.get(backend).forward(qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, (height, width), special_tokens, eps)
    return q.contiguous(), k.contiguous()


@_op.register_fake
def _(qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, grid, special_tokens, eps, backend):
    batch, tokens, _, heads, head_dim = qkv.shape
    return tuple(qkv.new_empty(batch, heads, tokens, head_dim) for _ in range(2))


@operator("qk_norm_rope_backward")
def _backward_op(
    d_q: Tensor,
    d_k: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: Sequence[int],
    special_tokens: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv (zero in its v part, contiguous), q_weight, q_bias, k_weight, k_bias."""
    backward = BACKENDS.get(backend).backward
    assert backward is not None  # every backend of this op has one
    height, width = grid
    with without_autocast(qkv):
        return backward(d_q, d_k, qkv, q_weight, k_weight, cos, sin, (height, width), special_tokens, eps)


@_backward_op.register_fake
def _(d_q, d_k, qkv, q_weight, k_weight, cos, sin, grid, special_tokens, eps, backend):
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    return d_qkv, *(torch.empty_like(x) for x in (q_weight, q_weight, k_weight, k_weight))


def _setup_context(ctx, inputs, output):
    qkv, q_weight, _, k_weight, _, cos, sin, ctx.grid, ctx.special_tokens, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)


def _autograd(ctx, d_q, d_k):
    gradients = torch.ops.page4d.qk_norm_rope_backward(d_q, d_k, *ctx.saved_tensors, ctx.grid, ctx.special_tokens, ctx.eps, ctx.backend)
    return (*gradients, None, None, None, None, None, None)


_op.register_autograd(_autograd, setup_context=_setup_context)
