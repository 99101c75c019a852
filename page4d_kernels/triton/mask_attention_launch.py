"""Launch of the attention kernels: outputs, tiles, descriptors, split keys, sums over heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends.mask_attention.problem import AttentionArgs
from ..layout import TokenLayout, empty_token_major
from . import autotune
from . import mask_attention as fwd
from . import mask_attention_backward as bwd
from .target import capability, multiprocessors, per_target

MIN_SPLIT_KEYS = 512  # merging a shorter split costs more than it gains


@dataclass(frozen=True)
class Rows:
    """How the query rows of a call see the bias; see `mask_attention.py`."""

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


# Rows, keys, warps, pipeline stages. The first is the built-in choice. Not yet measured on a GPU.
TILES = {
    "fwd_kernel": [(128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2)],
    "bwd_kernel_dq": [(64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 64, 8, 2)],
    "bwd_kernel_dkv": [(64, 64, 4, 2), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 3)],
}
WIDE_TILES = {  # head dims over 64, and targets other than Hopper
    "fwd_kernel": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
    "bwd_kernel_dq": [(64, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1)],
    "bwd_kernel_dkv": [(64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 8, 3)],
}
FP32_TILES = {
    "fwd_kernel": [(64, 32, 4, 2), (64, 64, 8, 1), (32, 32, 4, 2)],
    "bwd_kernel_dq": [(32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 2)],
    "bwd_kernel_dkv": [(32, 32, 4, 1), (32, 64, 8, 1), (32, 32, 4, 2)],
}


def _resources(kernel: str, head_dim: int, itemsize: int, config: autotune.Config) -> autotune.ResourceEstimate:
    """Shared memory: the loop's tiles once per stage, and the program's tile. Registers: accumulators, and logits (and their gradient)."""
    rows, keys, stages = config["BLOCK_M"], config["BLOCK_N"], config["num_stages"]
    if kernel == "fwd_kernel":
        return autotune.ResourceEstimate((2 * keys * stages + rows) * head_dim * itemsize, rows * head_dim + rows * keys)
    own, looped = (rows, keys) if kernel == "bwd_kernel_dq" else (keys, rows)
    outputs = 1 if kernel == "bwd_kernel_dq" else 2
    return autotune.ResourceEstimate(2 * (looped * stages + own) * head_dim * itemsize, outputs * own * head_dim + 2 * rows * keys)


@per_target
def candidates(kernel: str, head_dim: int, dtype: torch.dtype) -> list[autotune.Config]:
    narrow = head_dim <= 64 and capability() == 90
    tiles = FP32_TILES if dtype == torch.float32 else TILES if narrow else WIDE_TILES
    configs = [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True)) for tile in tiles[kernel]]
    return autotune.prune(configs, lambda config: _resources(kernel, _block_d(head_dim), dtype.itemsize, config))


def _launch(kernel: str, q: Tensor, rows: Rows, run: Callable[[autotune.Config], None]) -> None:
    mode = {fwd.PLAIN.value: "plain", fwd.PACKED.value: "packed", fwd.CHECKED.value: "checked"}[rows.mode]
    traits = (f"D{_block_d(q.shape[-1])}", q.dtype, mode, autotune.length_class(q.shape[2]))
    autotune.launch(f"mask_attention_{kernel}", traits, candidates(kernel, q.shape[-1], q.dtype), run)


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
    """Descriptors (Hopper and newer) need 16-byte alignment of base and strides, and a head dim that is a power of two from 16 to 128."""
    if capability() < 90:
        return False

    def aligned(x: Tensor) -> bool:
        size = x.element_size()
        return x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in _strides(x))

    return all(aligned(x) and x.shape[-1] in (16, 32, 64, 128) for x in tensors)


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Tiles of `block` rows of one head of (B, H, N, D)."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[-1]])


def _vectors(query_gate: Tensor | None, key_bias: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and bias with unit stride along the tokens, as the kernels read them. Without a bias, `unread` takes their place."""
    if query_gate is None or key_bias is None:
        return unread, unread
    return query_gate.contiguous(), key_bias.contiguous()


def splits_for(tiles: int, keys: int, device: torch.device) -> int:
    """Number of programs that share the keys of a tile: enough to fill the device, with at least MIN_SPLIT_KEYS keys each."""
    return max(1, min(multiprocessors() // tiles, keys // MIN_SPLIT_KEYS))


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    q, k, v, query_gate, key_bias, layout, scale = args
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    rows = Rows.of(query_gate, layout)
    tma = _tma_ready(k, v)
    out = empty_token_major(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    gate, bias = _vectors(query_gate, key_bias, lse)

    def run(config: autotune.Config) -> None:
        tiles = rows.tiles(queries, config["BLOCK_M"])
        splits = splits_for(tiles * batch * heads, keys, q.device)
        out_partial, lse_partial = out, lse
        if splits > 1:
            out_partial = torch.empty(splits * batch, heads, queries, head_dim, dtype=torch.float32, device=q.device)
            lse_partial = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=q.device)
        fwd.mask_attention_fwd_kernel[(tiles * batch * heads, splits)](
            q, *(_descriptor(x, config["BLOCK_N"]) if tma else x for x in (k, v)), gate, bias, out_partial, lse_partial,
            *_head_strides(q, k, v, out_partial), gate.stride(0), bias.stride(0), batch * heads * queries,
            tiles, heads, queries, keys, scale, rows.per_frame, rows.special, rows.packed,
            SPLIT=splits > 1, **_constants(q, rows, tma), **config,
        )  # fmt: skip
        if splits > 1:
            block = 32
            fwd.mask_attention_fwd_kernel_merge[(triton.cdiv(queries, block) * batch * heads,)](
                out_partial, lse_partial, out, lse, batch * heads * queries, *_head_strides(out), heads, queries, splits,
                D=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=block, num_warps=4,
            )  # fmt: skip

    _launch("fwd_kernel", q, rows, run)
    return out, lse


def backward(
    args: AttentionArgs, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    q, k, v, query_gate, key_bias, layout, scale = args
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    rows = Rows.of(query_gate, layout)
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    bwd.mask_attention_bwd_kernel_preprocess[(triton.cdiv(queries, 64) * batch * heads,)](
        out, d_out, lse, lse if d_lse is None else d_lse.contiguous(), delta, lse2,
        *_head_strides(out, d_out), heads, queries, rows.per_frame, rows.special,
        D=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=64, ROWS=rows.mode, LSE_GRAD=d_lse is not None, num_warps=4,
    )  # fmt: skip

    d_q, d_k, d_v = empty_token_major(q), empty_token_major(k), empty_token_major(v)
    packed = rows.mode == fwd.PACKED.value
    d_gate_heads = torch.empty(batch, heads, rows.packed if packed else queries, dtype=torch.float32, device=q.device)
    d_bias_heads = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    gate, bias = _vectors(query_gate, key_bias, lse)
    sizes = (heads, queries, keys, scale, rows.per_frame, rows.special, rows.packed)

    def run_dq(config: autotune.Config) -> None:
        tma = _tma_ready(k, v)
        tiles = rows.tiles(queries, config["BLOCK_M"])
        bwd.mask_attention_bwd_kernel_dq[(tiles * batch * heads,)](
            q, *(_descriptor(x, config["BLOCK_N"]) if tma else x for x in (k, v)), d_out, gate, bias, lse, lse2, delta,
            d_q, d_gate_heads,
            *_head_strides(q, k, v, d_out, d_q), gate.stride(0), bias.stride(0), tiles, *sizes, **_constants(q, rows, tma), **config,
        )  # fmt: skip

    def run_dkv(config: autotune.Config) -> None:
        tma = _tma_ready(q, d_out)
        tiles = triton.cdiv(keys, config["BLOCK_N"])
        bwd.mask_attention_bwd_kernel_dkv[(tiles * batch * heads,)](
            *(_descriptor(x, config["BLOCK_M"]) if tma else x for x in (q, d_out)), q, d_out, k, v, gate, bias, lse, lse2, delta,
            d_k, d_v, d_bias_heads,
            *_head_strides(q, k, v, d_out, d_k), gate.stride(0), bias.stride(0), tiles, *sizes, **_constants(q, rows, tma), **config,
        )  # fmt: skip

    _launch("bwd_kernel_dq", q, rows, run_dq)
    _launch("bwd_kernel_dkv", q, rows, run_dkv)
    if query_gate is None or layout is None:
        sums = (None, None) if query_gate is None else (d_gate_heads.sum(1), d_bias_heads.sum(1))
        return d_q, d_k, d_v, *sums
    d_gate = torch.zeros_like(query_gate)
    special = d_gate.unflatten(1, (layout.frames, layout.tokens_per_frame))[:, :, : layout.special_tokens]
    special.copy_(d_gate_heads.sum(1).unflatten(1, (layout.frames, layout.special_tokens)))
    return d_q, d_k, d_v, d_gate, d_bias_heads.sum(1)


def examples() -> dict[str, Callable[[], None]]:
    """Forward and backward at the official size (10 frames of 893 tokens, 2 heads of 64), for dry runs."""
    from ..testing import attention_inputs

    inputs = attention_inputs(TokenLayout(10, 893, 5), dtype=torch.bfloat16, packed=True)

    def launch(promise: bool, biased: bool) -> None:
        layout = inputs.layout if promise else None
        vectors = (inputs.query_gate, inputs.key_bias) if biased else (None, None)
        args = AttentionArgs(inputs.q, inputs.k, inputs.v, *vectors, layout, 0.125)
        out, lse = forward(args)
        backward(args, out, lse, torch.empty_like(out), None)

    return {
        "attention, layout": partial(launch, True, True),
        "attention, no layout": partial(launch, False, True),
        "attention, no bias": partial(launch, False, False),
    }
