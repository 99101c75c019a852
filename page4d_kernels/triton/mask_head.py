"""The dynamics-aware mask head in Triton: two passes over the tokens, without copying them.

`mask_head_fwd_kernel_stats` computes mean and 1 / standard deviation per frame and channel. `mask_head_fwd_kernel` normalises the nine
neighbours of each patch as it reads them (all but one from the cache). It applies the depthwise convolution, GELU, the C -> hidden matmul,
GELU, the hidden -> 1 matmul, the channel mean and the sigmoid, and writes the key bias. Gradients: `mask_head_backward.py`. Naming:
`mask_attention.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["frames", "special", "patches"])
def mask_head_fwd_kernel_stats(
    p_tokens, p_mean, p_rstd, s_b, s_f, s_p, s_c, frames, channels, special, patches, min_std,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and 1 / max(std, min_std) over the patches, (B*S, C) fp32, std unbiased. Grid (B*S, blocks of channels).

    Blocks of patches are merged by their means and squared deviations, so a large mean loses no digits.
    """
    i_f, i_c = tl.program_id(0), tl.program_id(1)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    p_tokens += (i_f // frames).to(tl.int64) * s_b + (i_f % frames).to(tl.int64) * s_f
    b_mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    b_m2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    for i_p in range(0, patches, BLOCK_P):
        o_p = i_p + tl.arange(0, BLOCK_P)
        m_x = (o_p < patches)[:, None] & m_c[None, :]
        o_x = (special + o_p).to(tl.int64)[:, None] * s_p + o_c[None, :] * s_c
        b_x = tl.load(p_tokens + o_x, mask=m_x, other=0.0).to(tl.float32)
        count = tl.minimum(patches - i_p, BLOCK_P).to(tl.float32)
        total = i_p + count
        b_block_mean = tl.sum(b_x, 0) / count
        b_deviation = tl.where(m_x, b_x - b_block_mean[None, :], 0.0)
        b_step = b_block_mean - b_mean
        b_m2 += tl.sum(b_deviation * b_deviation, 0) + b_step * b_step * (i_p * count / total)
        b_mean += b_step * (count / total)
    b_std = tl.sqrt(b_m2 / (patches - 1))
    o_out = i_f.to(tl.int64) * channels + o_c
    tl.store(p_mean + o_out, b_mean, mask=m_c)
    tl.store(p_rstd + o_out, 1 / tl.maximum(b_std, min_std), mask=m_c)


@triton.jit
def tap(p_z, o_y, o_x, o_c, m_p, m_c, b_mean, b_rstd, s_p, s_c, special, height, width, TAP: tl.constexpr):
    """Normalised tokens (patches, channels) of one of the nine neighbours. Padding is 0 after normalisation."""
    o_ty, o_tx = o_y + (TAP // 3 - 1), o_x + (TAP % 3 - 1)
    m_z = (m_p & (o_ty >= 0) & (o_ty < height) & (o_tx >= 0) & (o_tx < width))[:, None] & m_c[None, :]
    o_z = (special + o_ty * width + o_tx).to(tl.int64)[:, None] * s_p + o_c[None, :] * s_c
    b_z = tl.load(p_z + o_z, mask=m_z, other=0.0).to(tl.float32)
    return tl.where(m_z, (b_z - b_mean[None, :]) * b_rstd[None, :], 0.0)


@triton.jit
def depthwise(
    p_z, p_mean, p_rstd, p_w0, p_b0, o_y, o_x, o_c, m_p, m_c, s_p, s_c, special, height, width,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The convolution of the normalised tokens, and the normalised tokens; both (patches, channels)."""
    b_mean = tl.load(p_mean + o_c, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + o_c, mask=m_c, other=0.0)
    b_a = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32) + tl.load(p_b0 + o_c, mask=m_c, other=0.0)[None, :]
    b_centre = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for i_tap in tl.static_range(9):
        b_z = tap(p_z, o_y, o_x, o_c, m_p, m_c, b_mean, b_rstd, s_p, s_c, special, height, width, i_tap)
        b_a += b_z * tl.load(p_w0 + o_c * 9 + i_tap, mask=m_c, other=0.0)[None, :]
        if i_tap == 4:
            b_centre = b_z
    return b_a, b_centre


@triton.jit
def to_hidden(
    p_z, p_mean, p_rstd, p_w0, p_b0, p_w2, p_b2, o_y, o_x, o_h, m_p, m_h, s_p, s_c, channels, special, height, width,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Hidden layer before its GELU, (patches, hidden), and the sum of the normalised tokens over channels, (patches,)."""
    b_hidden = tl.zeros([BLOCK_P, BLOCK_H], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_P], dtype=tl.float32)
    for i_c in range(0, channels, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        b_a, b_centre = depthwise(
            p_z, p_mean, p_rstd, p_w0, p_b0, o_y, o_x, o_c, m_p, m_c, s_p, s_c, special, height, width, BLOCK_P, BLOCK_C
        )  # fmt: skip
        b_sum += tl.sum(b_centre, 1)
        o_w = o_h[None, :] * channels + o_c[:, None]
        b_w = tl.load(p_w2 + o_w, mask=m_c[:, None] & m_h[None, :], other=0.0)  # (BLOCK_C, BLOCK_H)
        b_hidden = tl.dot(gelu(b_a), b_w, b_hidden, input_precision=PRECISION)
    return b_hidden + tl.load(p_b2 + o_h, mask=m_h, other=0.0)[None, :], b_sum


@triton.jit(do_not_specialize=["frames", "special", "height", "width"])
def mask_head_fwd_kernel(
    p_tokens, p_mean, p_rstd, p_w0, p_b0, p_w2, p_b2, p_w4, p_b4, p_out,
    s_b, s_f, s_p, s_c, frames, channels, hidden, special, height, width,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Key bias (B, S*P) fp32. Grid (tiles of patches, B*S). Parameters fp32, contiguous, in their convolution shapes."""
    i_p, i_f = tl.program_id(0), tl.program_id(1)
    patches = height * width
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < patches
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < hidden
    p_tokens += (i_f // frames).to(tl.int64) * s_b + (i_f % frames).to(tl.int64) * s_f
    o_stat = i_f.to(tl.int64) * channels
    b_hidden, b_sum = to_hidden(
        p_tokens, p_mean + o_stat, p_rstd + o_stat, p_w0, p_b0, p_w2, p_b2, o_p // width, o_p % width, o_h, m_p, m_h,
        s_p, s_c, channels, special, height, width, BLOCK_P, BLOCK_C, BLOCK_H, PRECISION,
    )  # fmt: skip
    b_w4 = tl.load(p_w4 + o_h, mask=m_h, other=0.0)
    b_logit = tl.sum(gelu(b_hidden) * b_w4[None, :], 1) + tl.load(p_b4) + b_sum / channels
    p_out += i_f.to(tl.int64) * (special + patches)
    tl.store(p_out + special + o_p, tl.sigmoid(b_logit) - 0.5, mask=m_p)
    if i_p == 0:
        o_s = tl.arange(0, BLOCK_S)
        tl.store(p_out + o_s, tl.zeros([BLOCK_S], dtype=tl.float32), mask=o_s < special)
