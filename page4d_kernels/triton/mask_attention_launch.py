"""Launching the attention kernels: outputs, tiles, descriptors, split keys, sums over heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layout import TokenLayout
from . import autotune
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


# Rows, keys, warps, pipeline stages; the first that fits is the built-in choice. Not yet measured on a GPU.
TILES = {
    "forward": [(128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2)],
    "backward_rows": [(64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 64, 8, 2)],
    "backward_keys": [(64, 64, 4, 2), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 3)],
}
WIDE_TILES = {  # head dims over 64, and targets other than Hopper
    "forward": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
    "backward_rows": [(64, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1)],
    "backward_keys": [(64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 8, 3)],
}
FP32_TILES = {
    "forward": [(64, 32, 4, 2), (64, 64, 8, 1), (32, 32, 4, 2)],
    "backward_rows": [(32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 2)],
    "backward_keys": [(32, 32, 4, 1), (32, 64, 8, 1), (32, 32, 4, 2)],
}


def _need(kernel: str, head_dim: int, itemsize: int, config: autotune.Config) -> autotune.Need:
    """Tiles of the loop once per stage and the program's own; accumulators and the logits (and their gradient)."""
    rows, keys, stages = config["BLOCK_M"], config["BLOCK_N"], config["num_stages"]
    if kernel == "forward":
        return autotune.Need((2 * keys * stages + rows) * head_dim * itemsize, rows * head_dim + rows * keys)
    own, looped = (rows, keys) if kernel == "backward_rows" else (keys, rows)
    outputs = 1 if kernel == "backward_rows" else 2
    return autotune.Need(2 * (looped * stages + own) * head_dim * itemsize, outputs * own * head_dim + 2 * rows * keys)


def candidates(kernel: str, head_dim: int, dtype: torch.dtype) -> list[autotune.Config]:
    narrow = head_dim <= 64 and capability() == 90
    tiles = FP32_TILES if dtype == torch.float32 else TILES if narrow else WIDE_TILES
    configs = [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True)) for tile in tiles[kernel]]
    return autotune.prune(configs, lambda config: _need(kernel, _block_d(head_dim), dtype.itemsize, config))


def _choose(kernel: str, q: Tensor, rows: Rows, run: Callable[[autotune.Config], object]) -> autotune.Config:
    how = {fwd.PLAIN.value: "plain", fwd.PACKED.value: "packed", fwd.CHECKED.value: "checked"}[rows.mode]
    name = autotune.key(f"mask_attention.{kernel}", f"D{_block_d(q.shape[-1])}", q.dtype, how)
    return autotune.choose(name, candidates(kernel, q.shape[-1], q.dtype), run)


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _head_strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in _strides(x)]


def _constants(q: Tensor, rows: Rows, tma: bool) -> dict[str, Any]:
    head_dim = q.shape[-1]
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    return {"D": head_dim, "BLOCK_D": _block_d(head_dim), "ROWS": rows.mode, "TMA": tma, "PRECISION": precision}


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
    tma = _tma_ready(k, v)
    out = _token_major(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    gate, bias = _vectors(query_gate, key_bias, lse)

    def run(config: autotune.Config) -> None:
        tiles = rows.tiles(queries, config["BLOCK_M"])
        splits = splits_for(tiles * batch * heads, keys, q.device)
        part, part_lse = out, lse
        if splits > 1:
            part = torch.empty(splits * batch, heads, queries, head_dim, dtype=torch.float32, device=q.device)
            part_lse = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=q.device)
        fwd.forward[(tiles * batch * heads, splits)](
            q, *(_descriptor(x, config["BLOCK_N"]) if tma else x for x in (k, v)), gate, bias, part, part_lse,
            *_head_strides(q, k, v, part), gate.stride(0), bias.stride(0), batch * heads * queries,
            tiles, heads, queries, keys, scale, rows.per_frame, rows.special, rows.packed,
            SPLIT=splits > 1, **_constants(q, rows, tma), **config,
        )  # fmt: skip
        if splits > 1:
            block = 32
            fwd.merge[(triton.cdiv(queries, block) * batch * heads,)](
                part, part_lse, out, lse, batch * heads * queries, *_head_strides(out), heads, queries, splits,
                D=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=block, num_warps=4,
            )  # fmt: skip

    run(_choose("forward", q, rows, run))
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
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    bwd.preprocess[(triton.cdiv(queries, 64) * batch * heads,)](
        out, d_out, lse, lse if d_lse is None else d_lse.contiguous(), delta, lse2,
        *_head_strides(out, d_out), heads, queries, rows.per_frame, rows.special,
        D=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=64, ROWS=rows.mode, LSE_GRAD=d_lse is not None, num_warps=4,
    )  # fmt: skip

    d_q, d_k, d_v = _token_major(q), _token_major(k), _token_major(v)
    packed = rows.mode == fwd.PACKED.value
    d_gate_heads = torch.empty(batch, heads, rows.packed if packed else queries, dtype=torch.float32, device=q.device)
    d_bias_heads = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    gate, bias = _vectors(query_gate, key_bias, lse)
    numbers = (heads, queries, keys, scale, rows.per_frame, rows.special, rows.packed)

    def run_rows(config: autotune.Config) -> None:
        tma = _tma_ready(k, v)
        tiles = rows.tiles(queries, config["BLOCK_M"])
        bwd.backward_rows[(tiles * batch * heads,)](
            q, *(_descriptor(x, config["BLOCK_N"]) if tma else x for x in (k, v)), d_out, gate, bias, lse, lse2, delta,
            d_q, d_gate_heads,
            *_head_strides(q, k, v, d_out, d_q), gate.stride(0), bias.stride(0), tiles, *numbers, **_constants(q, rows, tma), **config,
        )  # fmt: skip

    def run_keys(config: autotune.Config) -> None:
        tma = _tma_ready(q, d_out)
        tiles = triton.cdiv(keys, config["BLOCK_N"])
        bwd.backward_keys[(tiles * batch * heads,)](
            *(_descriptor(x, config["BLOCK_M"]) if tma else x for x in (q, d_out)), q, d_out, k, v, gate, bias, lse, lse2, delta,
            d_k, d_v, d_bias_heads,
            *_head_strides(q, k, v, d_out, d_k), gate.stride(0), bias.stride(0), tiles, *numbers, **_constants(q, rows, tma), **config,
        )  # fmt: skip

    run_rows(_choose("backward_rows", q, rows, run_rows))
    run_keys(_choose("backward_keys", q, rows, run_keys))
    if query_gate is None or layout is None:
        sums = (None, None) if query_gate is None else (d_gate_heads.sum(1), d_bias_heads.sum(1))
        return d_q, d_k, d_v, *sums
    d_gate = torch.zeros_like(query_gate)
    special = d_gate.unflatten(1, (layout.frames, layout.tokens_per_frame))[:, :, : layout.special_tokens]
    special.copy_(d_gate_heads.sum(1).unflatten(1, (layout.frames, layout.special_tokens)))
    return d_q, d_k, d_v, d_gate, d_bias_heads.sum(1)
