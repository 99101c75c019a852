"""Launching the QK-norm + RoPE kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import qk_norm_rope as kernels

BLOCK_N = 32


def _blocks(head_dim: int) -> dict[str, int]:
    return {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_N": BLOCK_N, "num_warps": 4}


def _strides(qkv: Tensor) -> tuple[int, int, int, int]:
    return qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3)


def _fp32(table: Tensor) -> Tensor:
    return table.to(torch.float32).contiguous()


def forward(
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
    vectors = [x.contiguous() for x in (q_weight, q_bias, k_weight, k_bias)]
    kernels.forward[(triton.cdiv(tokens, BLOCK_N), batch * heads)](
        qkv, *vectors, _fp32(cos), _fp32(sin), q, k,
        *_strides(qkv), heads, tokens, special_tokens + grid[0] * grid[1], special_tokens, grid[1], eps, **_blocks(head_dim),
    )  # fmt: skip
    return q, k


def backward(
    d_q: Tensor,
    d_k: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: tuple[int, int],
    special_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    tiles = triton.cdiv(tokens, BLOCK_N)
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    d_qkv[:, :, 2].zero_()
    sums = torch.empty(4, tiles * batch * heads, head_dim, dtype=torch.float32, device=qkv.device)
    kernels.backward[(tiles, batch * heads)](
        d_q, d_k, qkv, q_weight.contiguous(), k_weight.contiguous(), _fp32(cos), _fp32(sin), d_qkv, sums,
        *d_q.stride(), *d_k.stride(), *_strides(qkv), sums.stride(0),
        heads, tokens, special_tokens + grid[0] * grid[1], special_tokens, grid[1], eps, **_blocks(head_dim),
    )  # fmt: skip
    d_qw, d_qb, d_kw, d_kb = (part.sum(0).to(q_weight.dtype) for part in sums)  # tensors of their own: an operator returns no views
    return d_qkv, d_qw, d_qb, d_kw, d_kb
