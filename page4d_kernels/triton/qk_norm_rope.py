"""LayerNorm over the head dimension and 2-D rotary embedding of q and k in Triton, in one pass over the packed projection.

A program owns a tile of tokens of one head, for both q and k. The rotation pairs channel d with its partner D/4 channels away. The partner
is loaded again from the cache instead of being shuffled between threads, and is normalised with the same statistics. Naming:
`mask_attention.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _channels(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channel, its partner, its column in the tables, its axis (0 row, 1 column), and the sign of the partner's sine."""
    o_d = tl.arange(0, BLOCK_D)
    o_local = o_d % (D // 2)
    is_first = o_local < D // 4
    o_partner = tl.where(is_first, o_d + D // 4, o_d - D // 4)
    return o_d, o_partner, o_local % (D // 4), o_d // (D // 2), tl.where(is_first, -1.0, 1.0)


@triton.jit
def _angles(p_cos, p_sin, o_n, m_x, per_frame, special, width, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and signed sin (BLOCK_N, BLOCK_D) of a tile of tokens. Special tokens are at position 0."""
    _, _, o_m, o_axis, sign = _channels(D, BLOCK_D)
    o_patch = o_n % per_frame - special
    o_y = tl.where(o_patch < 0, 0, o_patch // width + 1)
    o_x = tl.where(o_patch < 0, 0, o_patch % width + 1)
    o_table = tl.where(o_axis[None, :] == 0, o_y[:, None], o_x[:, None]) * (D // 4) + o_m[None, :]
    b_cos = tl.load(p_cos + o_table, mask=m_x, other=0.0)
    b_sin = tl.load(p_sin + o_table, mask=m_x, other=0.0)
    return b_cos, b_sin * sign[None, :]


@triton.jit
def _normalise(p_rows, m_x, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Normalised rows, normalised partners, and 1 / standard deviation. p_rows (BLOCK_N, 1) points to channel 0 of each token."""
    o_d, o_partner, _, _, _ = _channels(D, BLOCK_D)
    b_x = tl.load(p_rows + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_partner = tl.load(p_rows + o_partner[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, 1) / D
    b_x = tl.where((o_d < D)[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps)
    return b_x * b_rstd[:, None], (b_partner - b_mean[:, None]) * b_rstd[:, None], b_rstd


@triton.jit
def _vector(p_x, o_d, D: tl.constexpr):
    return tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["heads", "tokens", "per_frame", "special", "width"])
def qk_norm_rope_fwd_kernel(
    p_qkv, p_qw, p_qb, p_kw, p_kb, p_cos, p_sin, p_q, p_k,
    s_b, s_n, s_c, s_h, heads, tokens, per_frame, special, width, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q, k (B, H, N, D), contiguous, from qkv (B, N, 3, H, D). Grid (tiles of tokens * batch * heads,)."""
    tiles = tl.cdiv(tokens, BLOCK_N)
    i_n, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    o_d, o_partner, _, _, _ = _channels(D, BLOCK_D)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_x = (o_n < tokens)[:, None] & (o_d < D)[None, :]
    b_cos, b_sin = _angles(p_cos, p_sin, o_n, m_x, per_frame, special, width, D, BLOCK_D)
    p_in = p_qkv + (i_bh // heads).to(tl.int64) * s_b + (i_bh % heads).to(tl.int64) * s_h + o_n.to(tl.int64)[:, None] * s_n
    o_out = (i_bh.to(tl.int64) * tokens + o_n)[:, None] * D + o_d[None, :]

    b_x, b_partner, _ = _normalise(p_in, m_x, eps, D, BLOCK_D)
    b_y = b_x * _vector(p_qw, o_d, D) + _vector(p_qb, o_d, D)
    b_partner = b_partner * _vector(p_qw, o_partner, D) + _vector(p_qb, o_partner, D)
    tl.store(p_q + o_out, (b_y * b_cos + b_partner * b_sin).to(p_q.dtype.element_ty), mask=m_x)

    b_x, b_partner, _ = _normalise(p_in + s_c, m_x, eps, D, BLOCK_D)
    b_y = b_x * _vector(p_kw, o_d, D) + _vector(p_kb, o_d, D)
    b_partner = b_partner * _vector(p_kw, o_partner, D) + _vector(p_kb, o_partner, D)
    tl.store(p_k + o_out, (b_y * b_cos + b_partner * b_sin).to(p_k.dtype.element_ty), mask=m_x)


@triton.jit
def _backward_one(
    p_rows, p_d, p_d_rows, p_weight, p_dw, p_db, o_d, o_partner, m_x, b_cos, b_sin, s_d, eps, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The gradient of a rotation is the inverse rotation. That of LayerNorm is rstd (g - mean(g) - n mean(g n)) with g = dy w."""
    b_d = tl.load(p_d + o_d[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
    b_d_partner = tl.load(p_d + o_partner[None, :] * s_d, mask=m_x, other=0.0).to(tl.float32)
    b_dy = b_d * b_cos - b_d_partner * b_sin
    b_x, _, b_rstd = _normalise(p_rows, m_x, eps, D, BLOCK_D)
    b_g = b_dy * _vector(p_weight, o_d, D)
    b_mean, b_mean_x = tl.sum(b_g, 1) / D, tl.sum(b_g * b_x, 1) / D
    b_dx = b_rstd[:, None] * (b_g - b_mean[:, None] - b_x * b_mean_x[:, None])
    tl.store(p_d_rows + o_d[None, :], b_dx.to(p_d_rows.dtype.element_ty), mask=m_x)
    tl.store(p_dw + o_d, tl.sum(b_dy * b_x, 0), mask=o_d < D)
    tl.store(p_db + o_d, tl.sum(b_dy, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["heads", "tokens", "per_frame", "special", "width"])
def qk_norm_rope_bwd_kernel(
    p_dq, p_dk, p_qkv, p_qw, p_kw, p_cos, p_sin, p_dqkv, p_sums,
    s_qb, s_qh, s_qn, s_qd, s_kb, s_kh, s_kn, s_kd, s_b, s_n, s_c, s_h, s_sum, heads, tokens, per_frame, special, width, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The q and k parts of d_qkv (B, N, 3, H, D), contiguous, and per program the sums (4, programs, D) for the four parameters.

    Grid (tiles of tokens * batch * heads,). The caller adds the programs' sums in a fixed order.
    """
    tiles = tl.cdiv(tokens, BLOCK_N)
    i_n, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_d, o_partner, _, _, _ = _channels(D, BLOCK_D)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_rows = o_n.to(tl.int64)[:, None]
    m_x = (o_n < tokens)[:, None] & (o_d < D)[None, :]
    b_cos, b_sin = _angles(p_cos, p_sin, o_n, m_x, per_frame, special, width, D, BLOCK_D)
    p_in = p_qkv + i_b * s_b + i_h * s_h + o_rows * s_n
    p_out = p_dqkv + ((i_b * tokens + o_rows) * 3 * heads + i_h) * D
    p_sums += tl.program_id(0).to(tl.int64) * D
    p_d = p_dq + i_b * s_qb + i_h * s_qh + o_rows * s_qn
    _backward_one(p_in, p_d, p_out, p_qw, p_sums, p_sums + s_sum, o_d, o_partner, m_x, b_cos, b_sin, s_qd, eps, D, BLOCK_D)
    p_d = p_dk + i_b * s_kb + i_h * s_kh + o_rows * s_kn
    p_sums += 2 * s_sum.to(tl.int64)
    p_out += heads * D
    _backward_one(p_in + s_c, p_d, p_out, p_kw, p_sums, p_sums + s_sum, o_d, o_partner, m_x, b_cos, b_sin, s_kd, eps, D, BLOCK_D)
