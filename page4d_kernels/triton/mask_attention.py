"""Mask-modulated attention in Triton: softmax(q k^T * scale + r c^T) v, forward and backward, exact and deterministic.

Flash attention with three additions. Naming: i_* program ids, o_* offsets, m_* masks, p_* pointers, b_* blocks, s_* strides.

1. Only some tiles see the bias. With a `TokenLayout` (ROWS = PACKED) there are two launches. `mask_attention_fwd_kernel` covers all rows
   in contiguous tiles, without bias code. Then `mask_attention_fwd_kernel_packed` covers the gated rows, the first `special` of each
   frame, gathered into tiles of their own, and overwrites what the first launch stored there. One kernel with both loops would need the
   registers of the biased loop in every tile. Without a layout (ROWS = CHECKED) each tile checks its gate and takes one loop or the
   other. Without a bias ROWS = PLAIN.
2. The softmax is in base 2. In the forward, plain tiles keep q k^T unscaled and apply scale * log2(e) as one factor in the exponent.
   Biased tiles keep natural logits, scale included, and multiply by log2(e) after subtracting the maximum. In the backward, q k^T is
   multiplied by scale * log2(e) in every tile. The bias gets its log2(e) from r in the dq kernel and from c in the dkv kernel, because
   there the other vector enters dr or dc unscaled.
3. The backward has two kernels. One owns query rows (dq, dr), the other owns key rows (dk, dv, dc), so no sum needs atomics. The dkv
   kernel reads special rows twice. In its loop over contiguous rows their log-sum-exp is +inf, which makes their probability 0 at no
   cost. In its loop over packed rows they have their bias.

The first grid axis counts tiles, heads and batch, because the other axes are limited to 65535. Lengths are not specialised: a kernel is
compiled once for all clips.

With few query tiles, as in every packed launch, a GPU would be partly idle. Then the keys are split over programs, and
`mask_attention_fwd_kernel_merge` merges the partial results by log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

PLAIN: tl.constexpr = tl.constexpr(0)
PACKED: tl.constexpr = tl.constexpr(1)
CHECKED: tl.constexpr = tl.constexpr(2)


@triton.jit
def _packed_rows(i_tile, per_frame, special, BLOCK_M: tl.constexpr):
    """Sequence positions and packed positions of a tile of gated rows, each (BLOCK_M,). Rows are packed frame after frame."""
    o_p = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return (o_p // special) * per_frame + o_p % special, o_p


@triton.jit
def _load_rows(p_x, o_rows, m_rows, s_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (len(o_rows), BLOCK_D) of an (N, D) matrix; 0 where masked and past D."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + o_rows.to(tl.int64)[:, None] * s_row + o_d[None, :]
    m_x = m_rows[:, None]
    if D != BLOCK_D:
        m_x = m_x & (o_d < D)[None, :]
    return tl.load(p_rows, mask=m_x, other=0.0)


@triton.jit
def _store_rows(p_x, b_x, o_rows, m_rows, s_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + o_rows.to(tl.int64)[:, None] * s_row + o_d[None, :]
    m_x = m_rows[:, None]
    if D != BLOCK_D:
        m_x = m_x & (o_d < D)[None, :]
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _load_tile(x, i_b, i_h, i_n, n, s_b, s_h, s_n, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """Contiguous rows from i_n of head (i_b, i_h), (BLOCK_N, BLOCK_D), 0 past n. `x` is a tensor descriptor (TMA) or a pointer."""
    if TMA:
        b_x = x.load([i_b, i_h, i_n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_x = _load_rows(x + i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h, o_n, o_n < n, s_n, D, BLOCK_D)
    return b_x


@triton.jit
def _softmax_over_keys(
    b_acc, b_row_sum, b_row_max, b_q, b_r, k, v, p_c, i_b, i_h, start, end, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys start ... end. Only the last tile of a sequence is MASKED. Returns numerator, denominator, maximum.

    Without a bias b_s and the maximum are unscaled q k^T. The scale is applied in the exponent, one fused multiply-add per logit. With a
    bias they are natural logits, and log2(e) is applied after the maximum is subtracted: rounding log2(e) into a gate of 64 would lose
    digits.
    """
    to_base2 = LOG2E if BIASED else scale * LOG2E
    for i_n in tl.range(start, end, BLOCK_N, warp_specialize=SPECIALISED):
        b_k = _load_tile(k, i_b, i_h, i_n, n_k, s_kb, s_kh, s_kn, D, BLOCK_D, BLOCK_N, TMA)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        o_n = i_n + tl.arange(0, BLOCK_N)
        if BIASED:
            b_c = tl.load(p_c + o_n, mask=o_n < end, other=0.0)
            b_s = b_s * scale + b_r[:, None] * b_c[None, :]
        if MASKED:
            b_s = tl.where((o_n < end)[None, :], b_s, float("-inf"))
        b_row_max_new = tl.maximum(b_row_max, tl.max(b_s, 1))
        b_shift = tl.where(b_row_max_new == float("-inf"), 0.0, b_row_max_new)  # a row without a finite logit stays at exp2(-inf) = 0
        if BIASED:
            b_p = tl.exp2((b_s - b_shift[:, None]) * to_base2)
        else:
            b_p = tl.exp2(b_s * to_base2 - (b_shift * to_base2)[:, None])
        b_rescale = tl.exp2((b_row_max - b_shift) * to_base2)
        b_row_sum = b_row_sum * b_rescale + tl.sum(b_p, 1)
        b_v = _load_tile(v, i_b, i_h, i_n, n_k, s_vb, s_vh, s_vn, D, BLOCK_D, BLOCK_N, TMA)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision=PRECISION)
        b_row_max = b_row_max_new
    return b_acc, b_row_sum, b_row_max


@triton.jit
def _attend(
    b_q, b_r, k, v, p_c, i_b, i_h, start, end, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BIASED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """Output (BLOCK_M, BLOCK_D) in fp32 and natural log-sum-exp (BLOCK_M,) of one tile of rows over keys start ... end."""
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    whole = start + tl.maximum(end - start, 0) // BLOCK_N * BLOCK_N
    b_acc, b_row_sum, b_row_max = _softmax_over_keys(
        b_acc, b_row_sum, b_row_max, b_q, b_r, k, v, p_c, i_b, i_h, start, whole, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
        D, BLOCK_D, BLOCK_M, BLOCK_N, BIASED, False, TMA, PRECISION, SPECIALISED,
    )  # fmt: skip
    b_acc, b_row_sum, b_row_max = _softmax_over_keys(
        b_acc, b_row_sum, b_row_max, b_q, b_r, k, v, p_c, i_b, i_h, whole, end, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
        D, BLOCK_D, BLOCK_M, BLOCK_N, BIASED, True, TMA, PRECISION, SPECIALISED,
    )  # fmt: skip
    b_out = b_acc / tl.where(b_row_sum == 0, 1.0, b_row_sum)[:, None]
    b_lse = tl.where(b_row_sum == 0, float("-inf"), (b_row_max if BIASED else b_row_max * scale) + tl.log2(b_row_sum) * LN2)
    return b_out, b_lse


@triton.jit
def _share_of_keys(n_k, BLOCK_N: tl.constexpr):
    """First and end of the keys that are this program's by its place on the second grid axis. Shares are whole tiles."""
    span = tl.cdiv(tl.cdiv(n_k, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    start = tl.program_id(1) * span
    return start, tl.minimum(start + span, n_k)


@triton.jit(do_not_specialize=["s_rb", "s_cb", "s_split", "tiles", "heads", "n_q", "n_k"])
def mask_attention_fwd_kernel(
    q, k, v, p_r, p_c, p_out, p_lse,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on, s_rb, s_cb, s_split, tiles, heads, n_q, n_k, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """Contiguous rows; with CHECKED a tile with a gate has its bias. Grid (tiles of rows * batch * heads, splits of the keys).

    q (B, H, Nq, D): a pointer; k, v (B, H, Nk, D): descriptors or pointers; r (B, Nq), c (B, Nk) fp32; out (B, H, Nq, D), lse (B, H, Nq)
    fp32. With SPLIT, out and lse are fp32 partial results, one per split, `s_split` rows of lse apart.
    """
    i_tile, i_bh, i_split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    start, end = 0, n_k
    if SPLIT:
        start, end = _share_of_keys(n_k, BLOCK_N)
    p_c += i_b.to(tl.int64) * s_cb
    p_lse += i_bh.to(tl.int64) * n_q + i_split.to(tl.int64) * s_split
    p_out += i_b.to(tl.int64) * s_ob + i_h.to(tl.int64) * s_oh + i_split.to(tl.int64) * s_split * D
    o_rows = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < n_q
    b_q = _load_rows(q + i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh, o_rows, m_rows, s_qn, D, BLOCK_D)
    b_r = tl.zeros([BLOCK_M], dtype=tl.float32)
    gated = False
    if ROWS == CHECKED:
        b_r = tl.load(p_r + i_b.to(tl.int64) * s_rb + o_rows, mask=m_rows, other=0.0)
        gated = tl.max(tl.abs(b_r), 0) > 0
    if ROWS == CHECKED and gated:
        b_out, b_lse = _attend(
            b_q, b_r, k, v, p_c, i_b, i_h, start, end, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, True, TMA, PRECISION, False,
        )  # fmt: skip
    else:
        b_out, b_lse = _attend(
            b_q, b_r, k, v, p_c, i_b, i_h, start, end, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, False, TMA, PRECISION, SPECIALISED,
        )  # fmt: skip
    _store_rows(p_out, b_out, o_rows, m_rows, s_on, D, BLOCK_D)
    tl.store(p_lse + o_rows, b_lse, mask=m_rows)


@triton.jit(do_not_specialize=["s_rb", "s_cb", "s_split", "tiles", "heads", "n_k", "per_frame", "special", "n_packed"])
def mask_attention_fwd_kernel_packed(
    q, k, v, p_r, p_c, p_out, p_lse,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on, s_rb, s_cb, s_split,
    tiles, heads, n_k, scale, per_frame, special, n_packed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gated rows, with their bias. Grid (tiles of packed rows * batch * heads, splits of the keys).

    Arguments as above. out and lse are always partial results, even of a single split, and hold the n_packed rows alone.
    """
    i_tile, i_bh, i_split = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    i_b, i_h = i_bh // heads, i_bh % heads
    start, end = _share_of_keys(n_k, BLOCK_N)
    p_lse += i_bh.to(tl.int64) * n_packed + i_split.to(tl.int64) * s_split
    p_out += i_b.to(tl.int64) * s_ob + i_h.to(tl.int64) * s_oh + i_split.to(tl.int64) * s_split * D
    o_rows, o_p = _packed_rows(i_tile, per_frame, special, BLOCK_M)
    m_rows = o_p < n_packed
    b_q = _load_rows(q + i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh, o_rows, m_rows, s_qn, D, BLOCK_D)
    b_r = tl.load(p_r + i_b.to(tl.int64) * s_rb + o_rows, mask=m_rows, other=0.0)
    b_out, b_lse = _attend(
        b_q, b_r, k, v, p_c + i_b.to(tl.int64) * s_cb, i_b, i_h, start, end, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
        D, BLOCK_D, BLOCK_M, BLOCK_N, True, TMA, PRECISION, False,
    )  # fmt: skip
    _store_rows(p_out, b_out, o_p, m_rows, s_on, D, BLOCK_D)
    tl.store(p_lse + o_p, b_lse, mask=m_rows)


@triton.jit(do_not_specialize=["s_split", "heads", "n_q", "n_rows", "splits", "per_frame", "special"])
def mask_attention_fwd_kernel_merge(
    p_parts, p_part_lse, p_out, p_lse, s_split, s_ob, s_oh, s_on, heads, n_q, n_rows, splits, per_frame, special,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the splits in order: out = sum_i exp(lse_i - lse) out_i. Grid (tiles of rows * batch * heads,).

    parts (splits, B, H, n_rows, D) and part_lse (splits, B, H, n_rows) fp32, contiguous, `s_split` rows apart. They hold all rows, or with
    PACKED the gated ones, which go to their positions in out and lse (B, H, Nq).
    """
    tiles = tl.cdiv(n_rows, BLOCK_M)
    i_tile, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    o_rows = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < n_rows
    first = i_bh.to(tl.int64) * n_rows
    b_row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    offset = first
    for _ in range(splits):
        b_row_max = tl.maximum(b_row_max, tl.load(p_part_lse + offset + o_rows, mask=m_rows, other=0.0))
        offset += s_split
    b_shift = tl.where(b_row_max == float("-inf"), 0.0, b_row_max)
    b_row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    offset = first
    for _ in range(splits):
        b_weight = tl.exp2((tl.load(p_part_lse + offset + o_rows, mask=m_rows, other=0.0) - b_shift) * LOG2E)
        b_row_sum += b_weight
        b_acc += b_weight[:, None] * _load_rows(p_parts + offset * D, o_rows, m_rows, D, D, BLOCK_D)
        offset += s_split
    b_out = b_acc / tl.where(b_row_sum == 0, 1.0, b_row_sum)[:, None]
    b_lse = tl.where(b_row_sum == 0, float("-inf"), b_row_max + tl.log2(b_row_sum) * LN2)
    if ROWS == PACKED:
        o_rows, _ = _packed_rows(i_tile, per_frame, special, BLOCK_M)
    p_out += (i_bh // heads).to(tl.int64) * s_ob + (i_bh % heads).to(tl.int64) * s_oh
    _store_rows(p_out, b_out, o_rows, m_rows, s_on, D, BLOCK_D)
    tl.store(p_lse + i_bh.to(tl.int64) * n_q + o_rows, b_lse, mask=m_rows)
