"""Backward of mask-modulated attention in Triton; see `mask_attention.py` for the naming and the handling of gated rows.

With S2 the logits in base 2, P = exp2(S2 - lse2), delta = rowsum(dO * O) - dlse and dS = P * (dO V^T - delta):
dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K, dr_i = sum_hj dS_ij c_j, dc_j = sum_hi dS_ij r_i.
The caller computes the sums over heads last, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mask_attention import CHECKED, LOG2E, PACKED, PLAIN, _load_rows, _load_tile, _packed_rows, _share_of_keys, _store_rows


@triton.jit(do_not_specialize=["heads", "n_q", "per_frame", "special"])
def mask_attention_bwd_kernel_preprocess(
    p_out, p_d_out, p_lse, p_d_lse, p_delta, p_lse2,
    s_ob, s_oh, s_on, s_db, s_dh, s_dn, heads, n_q, per_frame, special,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, LSE_GRAD: tl.constexpr,
):  # fmt: skip
    """delta and the base-2 log-sum-exp for contiguous rows: +inf (probability 0) for special rows and rows without a finite logit."""
    tiles = tl.cdiv(n_q, BLOCK_M)
    i_tile, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    o_rows = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < n_q
    o_vec = i_bh.to(tl.int64) * n_q + o_rows
    b_out = _load_rows(p_out + i_b * s_ob + i_h * s_oh, o_rows, m_rows, s_on, D, BLOCK_D).to(tl.float32)
    b_d_out = _load_rows(p_d_out + i_b * s_db + i_h * s_dh, o_rows, m_rows, s_dn, D, BLOCK_D).to(tl.float32)
    b_delta = tl.sum(b_out * b_d_out, 1)
    if LSE_GRAD:
        b_delta -= tl.load(p_d_lse + o_vec, mask=m_rows, other=0.0)
    b_lse = tl.load(p_lse + o_vec, mask=m_rows, other=0.0)
    b_lse2 = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    if ROWS == PACKED:
        b_lse2 = tl.where(o_rows % per_frame < special, float("inf"), b_lse2)
    tl.store(p_delta + o_vec, b_delta, mask=m_rows)
    tl.store(p_lse2 + o_vec, b_lse2, mask=m_rows)


@triton.jit
def _gated_lse2(p_lse, o_rows, m_rows):
    """Base-2 log-sum-exp of gated rows. It is +inf, so the probability is 0, where there is no row or no finite logit."""
    b_lse = tl.load(p_lse + o_rows, mask=m_rows, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def _dq_over_keys(
    b_dq, b_dr, b_q, b_do, b_lse2, b_delta, b_r, k, v, p_c, i_b, i_h, start, end, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BIASED: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for i_n in tl.range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        b_k = _load_tile(k, i_b, i_h, i_n, n_k, s_kb, s_kh, s_kn, D, BLOCK_D, BLOCK_N, TMA)
        b_v = _load_tile(v, i_b, i_h, i_n, n_k, s_vb, s_vh, s_vn, D, BLOCK_D, BLOCK_N, TMA)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)  # (BLOCK_M, BLOCK_N)
        if BIASED:
            b_c = tl.load(p_c + o_n, mask=o_n < end, other=0.0)
            b_s += b_r[:, None] * b_c[None, :]
        b_p = tl.exp2(b_s - b_lse2[:, None])
        if MASKED:
            b_p = tl.where((o_n < end)[None, :], b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
        if BIASED:
            b_dr += tl.sum(b_ds * b_c[None, :], 1)
    return b_dq, b_dr


@triton.jit
def _dq_tile(
    q, d_out, k, v, p_c, o_rows, m_rows, b_lse2, b_delta, b_r, i_b, i_h, start, end, n_k,
    s_qn, s_dn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BIASED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_q = _load_rows(q, o_rows, m_rows, s_qn, D, BLOCK_D)
    b_do = _load_rows(d_out, o_rows, m_rows, s_dn, D, BLOCK_D)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_dr = tl.zeros([BLOCK_M], dtype=tl.float32)
    whole = start + tl.maximum(end - start, 0) // BLOCK_N * BLOCK_N
    b_dq, b_dr = _dq_over_keys(
        b_dq, b_dr, b_q, b_do, b_lse2, b_delta, b_r, k, v, p_c, i_b, i_h, start, whole, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
        D, BLOCK_D, BLOCK_N, BIASED, False, TMA, PRECISION,
    )  # fmt: skip
    return _dq_over_keys(
        b_dq, b_dr, b_q, b_do, b_lse2, b_delta, b_r, k, v, p_c, i_b, i_h, whole, end, n_k, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale,
        D, BLOCK_D, BLOCK_N, BIASED, True, TMA, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["s_rb", "s_cb", "tiles", "heads", "n_q", "n_k"])
def mask_attention_bwd_kernel_dq(
    q, k, v, d_out, p_r, p_c, p_lse2, p_delta, p_dq, p_dr,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_db, s_dh, s_dn, s_gb, s_gh, s_gn, s_rb, s_cb,
    tiles, heads, n_q, n_k, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of contiguous rows, and dr (B, H, Nq) with CHECKED. Grid (tiles of rows * batch * heads,). k, v: descriptors or pointers.

    r is multiplied by log2(e) for the base-2 logits; dr needs c unscaled. With PACKED the special rows get 0 here, because their lse2 is
    +inf.
    """
    i_tile, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
    d_out += i_b.to(tl.int64) * s_db + i_h.to(tl.int64) * s_dh
    p_dq += i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh
    p_c += i_b.to(tl.int64) * s_cb
    first = i_bh.to(tl.int64) * n_q
    o_rows = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows = o_rows < n_q
    b_lse2 = tl.load(p_lse2 + first + o_rows, mask=m_rows, other=float("inf"))
    b_delta = tl.load(p_delta + first + o_rows, mask=m_rows, other=0.0)
    b_r = tl.zeros([BLOCK_M], dtype=tl.float32)
    if ROWS == CHECKED:
        b_r = tl.load(p_r + i_b.to(tl.int64) * s_rb + o_rows, mask=m_rows, other=0.0) * LOG2E
    b_dq, b_dr = _dq_tile(
        q, d_out, k, v, p_c, o_rows, m_rows, b_lse2, b_delta, b_r, i_b, i_h, 0, n_k, n_k,
        s_qn, s_dn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, ROWS == CHECKED, TMA, PRECISION,
    )  # fmt: skip
    if ROWS == CHECKED:
        tl.store(p_dr + first + o_rows, b_dr, mask=m_rows)
    _store_rows(p_dq, b_dq * scale, o_rows, m_rows, s_gn, D, BLOCK_D)


@triton.jit(do_not_specialize=["s_rb", "s_cb", "s_split", "tiles", "heads", "n_q", "n_k", "per_frame", "special", "n_packed"])
def mask_attention_bwd_kernel_dq_packed(
    q, k, v, d_out, p_r, p_c, p_lse, p_delta, p_dq, p_dr,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_db, s_dh, s_dn, s_rb, s_cb, s_split,
    tiles, heads, n_q, n_k, scale, per_frame, special, n_packed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (splits, B, H, n_packed, D) and dr (splits, B, H, n_packed) of the gated rows over each share of the keys, fp32, contiguous.

    Grid (tiles of packed rows * batch * heads, splits of the keys); `s_split` rows lie between splits. The caller adds the shares in order.
    """
    i_tile, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    start, end = _share_of_keys(n_k, BLOCK_N)
    q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
    d_out += i_b.to(tl.int64) * s_db + i_h.to(tl.int64) * s_dh
    first = i_bh.to(tl.int64) * n_q
    o_rows, o_p = _packed_rows(i_tile, per_frame, special, BLOCK_M)
    m_rows = o_p < n_packed
    b_lse2 = _gated_lse2(p_lse + first, o_rows, m_rows)
    b_delta = tl.load(p_delta + first + o_rows, mask=m_rows, other=0.0)
    b_r = tl.load(p_r + i_b.to(tl.int64) * s_rb + o_rows, mask=m_rows, other=0.0) * LOG2E
    b_dq, b_dr = _dq_tile(
        q, d_out, k, v, p_c + i_b.to(tl.int64) * s_cb, o_rows, m_rows, b_lse2, b_delta, b_r, i_b, i_h, start, end, n_k,
        s_qn, s_dn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, True, TMA, PRECISION,
    )  # fmt: skip
    offset = i_bh.to(tl.int64) * n_packed + tl.program_id(1).to(tl.int64) * s_split
    _store_rows(p_dq + offset * D, b_dq * scale, o_p, m_rows, D, D, BLOCK_D)
    tl.store(p_dr + offset + o_p, b_dr, mask=m_rows)


@triton.jit
def _add_rows(b_dk, b_dv, b_dc, b_k, b_v, b_c, b_q, b_do, b_lse2, b_delta, b_r, scale, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """Add the contribution of a tile of query rows to dk, dv and dc of a tile of keys. Logits are (BLOCK_N, BLOCK_M)."""
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2E)
    if BIASED:
        b_s += b_c[:, None] * b_r[None, :]
    b_p = tl.exp2(b_s - b_lse2[None, :])
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    if BIASED:
        b_dc += tl.sum(b_ds * b_r[None, :], 1)
    return b_dk, b_dv, b_dc


@triton.jit(do_not_specialize=["s_rb", "s_cb", "tiles", "heads", "n_q", "n_k", "per_frame", "special", "n_packed"])
def mask_attention_bwd_kernel_dkv(
    q, d_out, p_q, p_d_out, p_k, p_v, p_r, p_c, p_lse, p_lse2, p_delta, p_dk, p_dv, p_dc,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_db, s_dh, s_dn, s_gb, s_gh, s_gn, s_rb, s_cb,
    tiles, heads, n_q, n_k, scale, per_frame, special, n_packed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv, and dc (B, H, Nk) per head. Grid (tiles of keys * batch * heads,).

    q and d_out are passed twice: as descriptors (with TMA) for contiguous rows, and as pointers for packed rows. dk and dv share strides.
    c is multiplied by log2(e) for the base-2 logits; dc needs r unscaled. The packed rows come in tiles of BLOCK_P, few enough that their
    loop needs no more registers than the one over contiguous rows.
    """
    i_tile, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    first = i_bh.to(tl.int64) * n_q
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n_k
    b_k = _load_rows(p_k + i_b.to(tl.int64) * s_kb + i_h.to(tl.int64) * s_kh, o_n, m_n, s_kn, D, BLOCK_D)
    b_v = _load_rows(p_v + i_b.to(tl.int64) * s_vb + i_h.to(tl.int64) * s_vh, o_n, m_n, s_vn, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dc = tl.zeros([BLOCK_N], dtype=tl.float32)
    b_c = tl.zeros([BLOCK_N], dtype=tl.float32)
    p_r += i_b.to(tl.int64) * s_rb
    p_c += i_b.to(tl.int64) * s_cb
    if ROWS == CHECKED:
        b_c = tl.load(p_c + o_n, mask=m_n, other=0.0) * LOG2E

    for i_m in tl.range(0, n_q, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < n_q
        b_q = _load_tile(q, i_b, i_h, i_m, n_q, s_qb, s_qh, s_qn, D, BLOCK_D, BLOCK_M, TMA)
        b_do = _load_tile(d_out, i_b, i_h, i_m, n_q, s_db, s_dh, s_dn, D, BLOCK_D, BLOCK_M, TMA)
        b_lse2 = tl.load(p_lse2 + first + o_m, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + first + o_m, mask=m_m, other=0.0)
        b_r = tl.zeros([BLOCK_M], dtype=tl.float32)
        if ROWS == CHECKED:
            b_r = tl.load(p_r + o_m, mask=m_m, other=0.0)
        b_dk, b_dv, b_dc = _add_rows(
            b_dk, b_dv, b_dc, b_k, b_v, b_c, b_q, b_do, b_lse2, b_delta, b_r, scale, ROWS == CHECKED, PRECISION
        )  # fmt: skip
    if ROWS == PACKED:
        p_q += i_b.to(tl.int64) * s_qb + i_h.to(tl.int64) * s_qh
        p_d_out += i_b.to(tl.int64) * s_db + i_h.to(tl.int64) * s_dh
        b_c = tl.load(p_c + o_n, mask=m_n, other=0.0) * LOG2E
        for i_t in tl.range(0, tl.cdiv(n_packed, BLOCK_P)):
            o_m, o_p = _packed_rows(i_t, per_frame, special, BLOCK_P)
            m_m = o_p < n_packed
            b_q = _load_rows(p_q, o_m, m_m, s_qn, D, BLOCK_D)
            b_do = _load_rows(p_d_out, o_m, m_m, s_dn, D, BLOCK_D)
            b_lse2 = _gated_lse2(p_lse + first, o_m, m_m)
            b_delta = tl.load(p_delta + first + o_m, mask=m_m, other=0.0)
            b_r = tl.load(p_r + o_m, mask=m_m, other=0.0)
            b_dk, b_dv, b_dc = _add_rows(
                b_dk, b_dv, b_dc, b_k, b_v, b_c, b_q, b_do, b_lse2, b_delta, b_r, scale, True, PRECISION
            )  # fmt: skip

    offset = i_b.to(tl.int64) * s_gb + i_h.to(tl.int64) * s_gh
    _store_rows(p_dk + offset, b_dk * scale, o_n, m_n, s_gn, D, BLOCK_D)
    _store_rows(p_dv + offset, b_dv, o_n, m_n, s_gn, D, BLOCK_D)
    if ROWS != PLAIN:
        tl.store(p_dc + i_bh.to(tl.int64) * n_k + o_n, b_dc, mask=m_n)
