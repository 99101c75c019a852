"""Plain PyTorch in linear memory: an online softmax over tiles of queries and keys, in fp32 for every input dtype.

The formulas are the reference's, applied tile by tile. Gate, bias and logits stay in fp32, so other backends use `chunked` for the few
gated rows. k and v are read tile by tile and never copied as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...layout import empty_token_major
from ...reference import accumulation_dtype
from ..registry import Backend
from .problem import AttentionArgs

TILE_LOGITS = 2**23  # logits of a tile, over batch and heads: 32 MiB in fp32
TILE_ROWS, TILE_KEYS = 512, 2048  # upper limits; only one tile of keys at a time is copied to fp32


def _tiles(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _tile_sizes(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Rows and keys of a tile."""
    batch, heads, queries, _ = q.shape
    rows = min(queries, TILE_ROWS)
    return rows, max(min(k.shape[2], TILE_KEYS, TILE_LOGITS // (batch * heads * rows)), 16)


def _tile_logits(b_q: Tensor, b_k: Tensor, query_gate: Tensor | None, key_bias: Tensor | None, rows: slice, keys: slice) -> Tensor:
    """Logits (B, H, rows, keys). b_q is already scaled."""
    logits = b_q @ b_k.transpose(-1, -2)
    if query_gate is not None and key_bias is not None:
        logits += query_gate[:, None, rows, None] * key_bias[:, None, None, keys]
    return logits


def _forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    q, k, v, query_gate, key_bias, _, scale = args
    dtype = accumulation_dtype(q.dtype)
    batch, heads, queries, _ = q.shape
    out = empty_token_major(q)
    lse = torch.empty(batch, heads, queries, dtype=dtype, device=q.device)
    row_tile, key_tile = _tile_sizes(q, k)
    for rows in _tiles(queries, row_tile):
        b_q = q[:, :, rows].to(dtype) * scale
        row_max = b_q.new_full((*b_q.shape[:3], 1), -torch.inf)
        row_sum = torch.zeros_like(row_max)
        b_out = torch.zeros_like(b_q)
        for keys in _tiles(k.shape[2], key_tile):
            logits = _tile_logits(b_q, k[:, :, keys].to(dtype), query_gate, key_bias, rows, keys)
            row_max_new = torch.maximum(row_max, logits.amax(-1, keepdim=True))
            shift = row_max_new.masked_fill(row_max_new == -torch.inf, 0)  # a row without a finite logit stays at exp(-inf) = 0
            p = logits.sub_(shift).exp_()
            rescale = torch.exp(row_max - shift)
            row_sum = row_sum * rescale + p.sum(-1, keepdim=True)
            b_out = b_out * rescale + p @ v[:, :, keys].to(dtype)
            row_max = row_max_new
        out[:, :, rows] = (b_out / row_sum.masked_fill(row_sum == 0, 1)).to(q.dtype)
        lse[:, :, rows] = (row_max + row_sum.log()).squeeze(-1)
    return out, lse


def _backward(
    args: AttentionArgs, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The outer loop runs over key tiles and sums their dk, dv and dc in fp32. dq and dr are kept in fp32 for all rows."""
    q, k, v, query_gate, key_bias, _, scale = args
    dtype = accumulation_dtype(q.dtype)
    d_q = torch.zeros(q.shape, dtype=dtype, device=q.device)
    d_k, d_v = torch.empty_like(k), torch.empty_like(v)
    delta = (d_out.to(dtype) * out.to(dtype)).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    shift = lse.masked_fill(lse == -torch.inf, 0)
    d_gate = torch.zeros_like(query_gate) if query_gate is not None else None
    d_bias = torch.zeros_like(key_bias) if key_bias is not None else None
    row_tile, key_tile = _tile_sizes(q, k)
    for keys in _tiles(k.shape[2], key_tile):
        b_k, b_v = k[:, :, keys].to(dtype), v[:, :, keys].to(dtype)
        b_dk, b_dv = torch.zeros_like(b_k), torch.zeros_like(b_v)
        for rows in _tiles(q.shape[2], row_tile):
            b_q, b_do = q[:, :, rows].to(dtype) * scale, d_out[:, :, rows].to(dtype)
            p = _tile_logits(b_q, b_k, query_gate, key_bias, rows, keys).sub_(shift[:, :, rows, None]).exp_()
            b_dv += p.transpose(-1, -2) @ b_do
            d_logits = p.mul_((b_do @ b_v.transpose(-1, -2)).sub_(delta[:, :, rows, None]))
            d_q[:, :, rows] += d_logits @ b_k
            b_dk += d_logits.transpose(-1, -2) @ b_q
            if query_gate is not None and key_bias is not None and d_gate is not None and d_bias is not None:
                over_heads = d_logits.sum(1)
                d_gate[:, rows] += (over_heads @ key_bias[:, keys, None]).squeeze(-1)
                d_bias[:, keys] += (query_gate[:, None, rows] @ over_heads).squeeze(1)
        d_k[:, :, keys], d_v[:, :, keys] = b_dk.to(k.dtype), b_dv.to(v.dtype)
    return (d_q * scale).to(q.dtype), d_k, d_v, d_gate, d_bias


BACKEND = Backend("chunked", "plain PyTorch in linear memory, fp32 softmax, any device", _forward, _backward)
