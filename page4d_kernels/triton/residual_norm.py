"""LayerScale, residual addition and LayerNorm in one pass, in Triton.

A program owns whole rows, so it computes a row's statistics from values that it holds. Naming: `mask_attention.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _vector(p_x, o_c, C: tl.constexpr):
    return tl.load(p_x + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normalise(b_x, o_c, eps, C: tl.constexpr):
    """Rows with mean 0 and variance 1 (0 in padded channels), and 1 / standard deviation."""
    b_x = tl.where((o_c < C)[None, :], b_x - (tl.sum(b_x, 1) / C)[:, None], 0.0)
    b_rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 1) / C + eps)
    return b_x * b_rstd[:, None], b_rstd


@triton.jit(do_not_specialize=["rows"])
def residual_norm_fwd_kernel(
    p_x, p_branch, p_scale, p_weight, p_bias, p_total, p_normal, rows, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total, normal (rows, C) of x and branch (rows, C), all contiguous. Grid (tiles of rows,)."""
    o_n, o_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    m_x = (o_n < rows)[:, None] & (o_c < C)[None, :]
    o_x = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_branch = tl.load(p_branch + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_total = (b_x + _vector(p_scale, o_c, C) * b_branch).to(p_total.dtype.element_ty)
    tl.store(p_total + o_x, b_total, mask=m_x)
    b_normal, _ = _normalise(b_total.to(tl.float32), o_c, eps, C)  # of the stored (rounded) sum, as in the backward
    b_normal = b_normal * _vector(p_weight, o_c, C) + _vector(p_bias, o_c, C)
    tl.store(p_normal + o_x, b_normal.to(p_normal.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["rows", "tiles"])
def residual_norm_bwd_kernel(
    p_d_total, p_d_normal, p_total, p_branch, p_scale, p_weight, p_dx, p_d_branch, p_sums, s_sum, rows, tiles, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx, d_branch (rows, C), and per program the sums (3, programs, C) for scale, weight and bias. Grid (programs,), `tiles` tiles each.

    The caller adds the programs' sums in a fixed order.
    """
    i = tl.program_id(0)
    o_c = tl.arange(0, BLOCK_C)
    b_scale, b_weight = _vector(p_scale, o_c, C), _vector(p_weight, o_c, C)
    b_dscale = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_dweight = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_C], dtype=tl.float32)
    for i_tile in range(i * tiles, (i + 1) * tiles):
        o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_x = (o_n < rows)[:, None] & (o_c < C)[None, :]
        o_x = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
        b_n, b_rstd = _normalise(tl.load(p_total + o_x, mask=m_x, other=0.0).to(tl.float32), o_c, eps, C)
        b_dn = tl.load(p_d_normal + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_g = b_dn * b_weight
        b_dx = b_g - (tl.sum(b_g, 1) / C)[:, None] - b_n * (tl.sum(b_g * b_n, 1) / C)[:, None]
        b_dx = tl.load(p_d_total + o_x, mask=m_x, other=0.0).to(tl.float32) + b_rstd[:, None] * b_dx
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
        tl.store(p_d_branch + o_x, (b_dx * b_scale).to(p_d_branch.dtype.element_ty), mask=m_x)
        b_branch = tl.load(p_branch + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dscale += tl.sum(b_dx * b_branch, 0)
        b_dweight += tl.sum(b_dn * b_n, 0)
        b_dbias += tl.sum(b_dn, 0)
    o_sum = i.to(tl.int64) * C + o_c
    tl.store(p_sums + o_sum, b_dscale, mask=o_c < C)
    tl.store(p_sums + s_sum + o_sum, b_dweight, mask=o_c < C)
    tl.store(p_sums + 2 * s_sum + o_sum, b_dbias, mask=o_c < C)
