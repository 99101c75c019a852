"""q and k from the packed projection: LayerNorm over the head dimension, then 2-D rotary embedding."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from . import accumulation_dtype


def rope_tables(
    grid: tuple[int, int],
    head_dim: int,
    base: float = 100.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin (max(h, w) + 1, head_dim / 4) of p * base^(-2m / (head_dim / 2)) for positions p = 0 .. max(h, w).

    The angles are computed in fp32, as in the released model, then cast to `dtype` (float32, or float64 for a float64 model).
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    angles = torch.arange(max(grid) + 1, dtype=torch.float32, device=device)[:, None] * (1.0 / base**exponent)[None, :]
    angles = angles.to(dtype)
    return angles.cos(), angles.sin()


def positions(grid: tuple[int, int], special_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """y and x position of each token of a frame, each (P,): 0 for special tokens, row + 1 and column + 1 for patches."""
    height, width = grid
    patch = torch.arange(height * width, device=device)
    zeros = patch.new_zeros(special_tokens)
    return torch.cat([zeros, patch // width + 1]), torch.cat([zeros, patch % width + 1])


def _token_tables(cos: Tensor, sin: Tensor, grid: tuple[int, int], special_tokens: int, tokens: int, dtype: torch.dtype):
    """cos and sin per token, (N, 2, D/4): the first half of the head dimension is rotated by y, the second by x."""
    y, x = positions(grid, special_tokens, cos.device)
    frames = tokens // len(y)
    return tuple(torch.stack([table[y], table[x]], 1).repeat(frames, 1, 1).to(dtype) for table in (cos, sin))


def _rotate(f: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half in each of the two halves (y and x) of the last dimension. f is (..., N, D), cos and sin are (N, 2, D/4)."""
    a, b = rearrange(f, "... (yx half d) -> half ... yx d", yx=2, half=2)
    return rearrange([a * cos - b * sin, b * cos + a * sin], "half ... yx d -> ... (yx half d)")


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x - mean) * rstd, rstd


def qk_norm_rope(
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
    """q and k (B, H, N, D) in qkv's dtype from qkv (B, N, 3, H, D)."""
    dtype = accumulation_dtype(qkv.dtype)
    tables = _token_tables(cos, sin, grid, special_tokens, qkv.shape[1], dtype)
    outputs = []
    for index, (weight, bias) in enumerate([(q_weight, q_bias), (k_weight, k_bias)]):
        x = qkv[:, :, index].to(dtype).transpose(1, 2)
        normal, _ = _normalise(x, eps)
        outputs.append(_rotate(normal * weight.to(dtype) + bias.to(dtype), *tables).to(qkv.dtype))
    return outputs[0], outputs[1]


def qk_norm_rope_backward(
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
    """Gradients of qkv (zero in its v part), q_weight, q_bias, k_weight, k_bias.

    The gradient of a rotation is the inverse rotation. The gradient of LayerNorm is rstd (g - mean(g) - n mean(g n)), with n the normalised
    input and g = dy w.
    """
    dtype = accumulation_dtype(qkv.dtype)
    cos_, sin_ = _token_tables(cos, sin, grid, special_tokens, qkv.shape[1], dtype)
    d_qkv = torch.zeros(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    d_parameters = []
    for index, (d_out, weight) in enumerate([(d_q, q_weight), (d_k, k_weight)]):
        normal, rstd = _normalise(qkv[:, :, index].to(dtype).transpose(1, 2), eps)
        d_affine = _rotate(d_out.to(dtype), cos_, -sin_)
        g = d_affine * weight.to(dtype)
        d_x = rstd * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
        d_qkv[:, :, index] = d_x.transpose(1, 2)
        d_parameters += [(d_affine * normal).sum((0, 1, 2)).to(weight.dtype), d_affine.sum((0, 1, 2)).to(weight.dtype)]
    return d_qkv, d_parameters[0], d_parameters[1], d_parameters[2], d_parameters[3]
