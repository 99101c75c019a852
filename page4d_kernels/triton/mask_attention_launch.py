"""Launching the attention kernels: outputs, tiles, descriptors, split keys, sums over heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layout import TokenLayout
from . import mask_attention as fwd
from . import mask_attention_backward as bwd
from .target import capability, multiprocessors

MIN_SPLIT_KEYS = 512  # a split shorter than that costs more in merging than it gains


@dataclass(frozen=True)
class Rows:
    """How the query rows of a call meet the bias; see `mask_attention.py`."""

    mode: int
    per_frame: int = 1
    special: int = 1
    packed: int = 0  # gated rows, with PACKED

    @classmethod
    def of(cls, query_gate: Tensor | None, layout: TokenLayout | None) -> Rows:
        if query_gate is None:
            return cls(fwd.PLAIN.value)
        if layout is None:
            return cls(fwd.CHECKED.value)
        return cls(fwd.PACKED.value, layout.tokens_per_frame, layout.special_tokens, layout.frames * layout.special_tokens)

    def tiles(self, rows: int, block: int) -> int:
        return triton.cdiv(rows, block) + triton.cdiv(self.packed, block)


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile(kernel: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Tile sizes: chosen by shared memory and registers, not yet measured on a GPU."""
    wide, single, hopper = head_dim > 64, dtype == torch.float32, capability() == 90
    if kernel == "forward":
        return Tile(64, 32, 4, 2) if single else Tile(128, 64, 4 if hopper and not wide else 8, 3)
    return Tile(32, 32, 4, 1) if single else Tile(64, 64, 4 if hopper and not wide else 8, 2)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _head_strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in _strides(x)]


def _constants(q: Tensor, rows: Rows, shape: Tile, tma: bool) -> dict[str, Any]:
    head_dim = q.shape[-1]
    return {
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "ROWS": rows.mode,
        "TMA": tma,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
    }


def _tma_ready(*tensors: Tensor) -> bool:
    """Descriptors (Hopper and newer) want 16-byte alignment of base and strides, and a head dim that is a block."""
    if capability() < 90:
        return False

    def aligned(x: Tensor) -> bool:
        size = x.element_size()
        return x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in _strides(x))

    return all(aligned(x) and x.shape[-1] in (16, 32, 64, 128) for x in tensors)


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Tiles of `block` rows of one head of (B, H, N, D)."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[-1]])


def _token_major(like: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = like.shape
    return torch.empty(batch, tokens, heads, head_dim, dtype=like.dtype, device=like.device).transpose(1, 2)


def _vectors(query_gate: Tensor | None, key_bias: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and bias with unit stride along the tokens, as the kernels read them; without a bias something that is never read."""
    if query_gate is None or key_bias is None:
        return unread, unread
    return query_gate.contiguous(), key_bias.contiguous()


def splits_for(tiles: int, keys: int, device: torch.device) -> int:
    """Over how many programs to split the keys of a tile: enough to fill the device, while each keeps a useful number of keys."""
    return max(1, min(multiprocessors(device) // tiles, keys // MIN_SPLIT_KEYS))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    layout: TokenLayout | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    rows = Rows.of(query_gate, layout)
    shape = tile("forward", head_dim, q.dtype)
    tma = _tma_ready(k, v)
    out = _token_major(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    tiles = rows.tiles(queries, shape.block_m)
    splits = splits_for(tiles * batch * heads, keys, q.device)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty(splits * batch, heads, queries, head_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=q.device)
    gate, bias = _vectors(query_gate, key_bias, lse)
    fwd.forward[(tiles, batch * heads, splits)](
        q, *(_descriptor(x, shape.block_n) if tma else x for x in (k, v)), gate, bias, part, part_lse,
        *_head_strides(q, k, v, part), gate.stride(0), bias.stride(0), batch * heads * queries,
        heads, queries, keys, scale, rows.per_frame, rows.special, rows.packed,
        SPLIT=splits > 1, **_constants(q, rows, shape, tma),
    )  # fmt: skip
    if splits > 1:
        block = 32
        fwd.merge[(triton.cdiv(queries, block), batch * heads)](
            part, part_lse, out, lse, batch * heads * queries, *_head_strides(out), heads, queries, splits,
            D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), BLOCK_M=block, num_warps=4,
        )  # fmt: skip
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    layout: TokenLayout | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    rows = Rows.of(query_gate, layout)
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    block_d = max(16, triton.next_power_of_2(head_dim))
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    bwd.preprocess[(triton.cdiv(queries, 64), batch * heads)](
        out, d_out, lse, lse if d_lse is None else d_lse.contiguous(), delta, lse2,
        *_head_strides(out, d_out), heads, queries, rows.per_frame, rows.special,
        D=head_dim, BLOCK_D=block_d, BLOCK_M=64, ROWS=rows.mode, LSE_GRAD=d_lse is not None, num_warps=4,
    )  # fmt: skip

    d_q, d_k, d_v = _token_major(q), _token_major(k), _token_major(v)
    packed = rows.mode == fwd.PACKED.value
    d_gate_heads = torch.empty(batch, heads, rows.packed if packed else queries, dtype=torch.float32, device=q.device)
    d_bias_heads = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    gate, bias = _vectors(query_gate, key_bias, lse)
    numbers = (heads, queries, keys, scale, rows.per_frame, rows.special, rows.packed)

    shape = tile("backward_rows", head_dim, q.dtype)
    tma = _tma_ready(k, v)
    bwd.backward_rows[(rows.tiles(queries, shape.block_m), batch * heads)](
        q, *(_descriptor(x, shape.block_n) if tma else x for x in (k, v)), d_out, gate, bias, lse, lse2, delta, d_q, d_gate_heads,
        *_head_strides(q, k, v, d_out, d_q), gate.stride(0), bias.stride(0), *numbers, **_constants(q, rows, shape, tma),
    )  # fmt: skip
    shape = tile("backward_keys", head_dim, q.dtype)
    tma = _tma_ready(q, d_out)
    bwd.backward_keys[(triton.cdiv(keys, shape.block_n), batch * heads)](
        *(_descriptor(x, shape.block_m) if tma else x for x in (q, d_out)), q, d_out, k, v, gate, bias, lse, lse2, delta,
        d_k, d_v, d_bias_heads,
        *_head_strides(q, k, v, d_out, d_k), gate.stride(0), bias.stride(0), *numbers, **_constants(q, rows, shape, tma),
    )  # fmt: skip
    if query_gate is None or layout is None:
        sums = (None, None) if query_gate is None else (d_gate_heads.sum(1), d_bias_heads.sum(1))
        return d_q, d_k, d_v, *sums
    d_gate = torch.zeros_like(query_gate)
    special = d_gate.unflatten(1, (layout.frames, layout.tokens_per_frame))[:, :, : layout.special_tokens]
    special.copy_(d_gate_heads.sum(1).unflatten(1, (layout.frames, layout.special_tokens)))
    return d_q, d_k, d_v, d_gate, d_bias_heads.sum(1)
