"""Gradients of the mask head's six parameters in Triton; see `mask_head.py` for the forward and the helpers.

With z the normalised tokens, a0 = depthwise(z), a2 = W2 gelu(a0) + b2, g = w4 gelu(a2) + b4 and s = sigmoid(g + mean z) - 1/2:

    dg = ds (1/4 - s^2)        dw4 = sum dg gelu(a2)       db4 = sum dg
    da2 = dg w4 gelu'(a2)      dW2 = sum da2 gelu(a0)^T    db2 = sum da2
    da0 = W2^T da2 gelu'(a0)   dw0_tap = sum da0 z_tap     db0 = sum da0       (sums over the patches of all frames)

`mask_head_bwd_kernel_hidden` owns patches. It repeats the forward, stores da2 (patches, hidden) and the partial sums of its tile.
`mask_head_bwd_kernel_channels` owns channels. It repeats the depthwise convolution of a block of channels over a share of the tiles.
Neither stores anything of size patches x C. Every sum has one writer. The caller adds the partial sums last, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask_head import depthwise, gelu, tap, to_hidden


@triton.jit
def _gelu_slope(x):
    """Phi(x) + x phi(x)."""
    return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit(do_not_specialize=["frames", "special", "height", "width"])
def mask_head_bwd_kernel_hidden(
    p_d_out, p_tokens, p_mean, p_rstd, p_w0, p_b0, p_w2, p_b2, p_w4, p_b4, p_da2, p_dw4, p_db4, p_db2,
    s_b, s_f, s_p, s_c, frames, channels, n_hidden, special, height, width,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da2 (B*S, patches, hidden), and per program dw4, db2 (programs, hidden) and db4 (programs,). Grid (tiles of patches, B*S)."""
    i_p, i_f = tl.program_id(0), tl.program_id(1)
    patches = height * width
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < patches
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < n_hidden
    p_tokens += (i_f // frames).to(tl.int64) * s_b + (i_f % frames).to(tl.int64) * s_f
    o_stat = i_f.to(tl.int64) * channels
    b_a2, b_sum = to_hidden(
        p_tokens, p_mean + o_stat, p_rstd + o_stat, p_w0, p_b0, p_w2, p_b2, o_p // width, o_p % width, o_h, m_p, m_h,
        s_p, s_c, channels, special, height, width, BLOCK_P, BLOCK_C, BLOCK_H, PRECISION,
    )  # fmt: skip
    b_w4 = tl.load(p_w4 + o_h, mask=m_h, other=0.0)
    b_h2 = gelu(b_a2)
    b_s = tl.sigmoid(tl.sum(b_h2 * b_w4[None, :], 1) + tl.load(p_b4) + b_sum / channels) - 0.5
    b_d = tl.load(p_d_out + i_f.to(tl.int64) * (special + patches) + special + o_p, mask=m_p, other=0.0)
    b_dg = b_d * (0.25 - b_s * b_s)
    b_da2 = b_dg[:, None] * b_w4[None, :] * _gelu_slope(b_a2)
    o_da2 = (i_f.to(tl.int64) * patches + o_p)[:, None] * n_hidden + o_h[None, :]
    tl.store(p_da2 + o_da2, b_da2, mask=m_p[:, None] & m_h[None, :])
    i_program = i_f.to(tl.int64) * tl.num_programs(0) + i_p
    tl.store(p_dw4 + i_program * n_hidden + o_h, tl.sum(b_dg[:, None] * b_h2, 0), mask=m_h)
    tl.store(p_db2 + i_program * n_hidden + o_h, tl.sum(b_da2, 0), mask=m_h)
    tl.store(p_db4 + i_program, tl.sum(b_dg, 0))


@triton.jit(do_not_specialize=["frames", "special", "height", "width", "tiles", "last"])
def mask_head_bwd_kernel_channels(
    p_tokens, p_mean, p_rstd, p_w0, p_b0, p_w2, p_da2, p_dw2, p_dw0, p_db0,
    s_b, s_f, s_p, s_c, frames, n_channels, n_hidden, special, height, width, tiles, last,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per share of the tiles dw2 (shares, C, hidden), dw0 (shares, 9, C) and db0 (shares, C). Grid (blocks of channels, shares).

    There are `last` tiles of patches in total, `tiles` per frame.
    """
    i_c, i_share = tl.program_id(0), tl.program_id(1)
    patches = height * width
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < n_channels
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < n_hidden
    o_tap = tl.arange(0, 16)
    b_dw2 = tl.zeros([BLOCK_C, BLOCK_H], dtype=tl.float32)
    b_dw0 = tl.zeros([16, BLOCK_C], dtype=tl.float32)  # one row for each of the nine taps
    b_db0 = tl.zeros([BLOCK_C], dtype=tl.float32)
    share = tl.cdiv(last, tl.num_programs(1))
    for i_tile in range(i_share * share, tl.minimum((i_share + 1) * share, last)):
        i_f = i_tile // tiles
        o_p = (i_tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        m_p = o_p < patches
        o_y, o_x = o_p // width, o_p % width
        p_z = p_tokens + tl.cast(i_f // frames, tl.int64) * s_b + tl.cast(i_f % frames, tl.int64) * s_f
        o_stat = tl.cast(i_f, tl.int64) * n_channels
        b_a0, _ = depthwise(
            p_z, p_mean + o_stat, p_rstd + o_stat, p_w0, p_b0, o_y, o_x, o_c, m_p, m_c, s_p, s_c, special, height, width,
            BLOCK_P, BLOCK_C,
        )  # fmt: skip
        p_rows = p_da2 + (tl.cast(i_f, tl.int64) * patches + o_p)[:, None] * n_hidden
        b_da2 = tl.load(p_rows + o_h[None, :], mask=m_p[:, None] & m_h[None, :], other=0.0)
        b_dw2 = tl.dot(tl.trans(gelu(b_a0)), b_da2, b_dw2, input_precision=PRECISION)
        b_dh0 = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
        for i_k in range(0, n_hidden, BLOCK_K):  # in slices: the operands of a single matmul would fill the registers
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < n_hidden
            b_rows = tl.load(p_rows + o_k[None, :], mask=m_p[:, None] & m_k[None, :], other=0.0)
            b_w2 = tl.load(p_w2 + o_k[:, None] * n_channels + o_c[None, :], mask=m_k[:, None] & m_c[None, :], other=0.0)
            b_dh0 = tl.dot(b_rows, b_w2, b_dh0, input_precision=PRECISION)
        b_da0 = b_dh0 * _gelu_slope(b_a0)
        b_db0 += tl.sum(b_da0, 0)
        b_mean = tl.load(p_mean + o_stat + o_c, mask=m_c, other=0.0)
        b_rstd = tl.load(p_rstd + o_stat + o_c, mask=m_c, other=0.0)
        for i_tap in tl.static_range(9):  # read again from the cache: nine tiles at a time would not fit into registers
            b_z = tap(p_z, o_y, o_x, o_c, m_p, m_c, b_mean, b_rstd, s_p, s_c, special, height, width, i_tap)
            b_dw0 += tl.where((o_tap == i_tap)[:, None], tl.sum(b_da0 * b_z, 0)[None, :], 0.0)
    o_share = i_share.to(tl.int64) * n_channels
    tl.store(p_dw2 + (o_share + o_c)[:, None] * n_hidden + o_h[None, :], b_dw2, mask=m_c[:, None] & m_h[None, :])
    tl.store(p_dw0 + o_share * 9 + o_tap[:, None] * n_channels + o_c[None, :], b_dw0, mask=(o_tap < 9)[:, None] & m_c[None, :])
    tl.store(p_db0 + o_share + o_c, b_db0, mask=m_c)
