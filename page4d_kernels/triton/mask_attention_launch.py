"""Launch of the attention kernels: outputs, tiles, descriptors, split keys, sums over heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends.mask_attention.problem import AttentionArgs
from ..layout import TokenLayout, empty_token_major
from . import autotune, launcher
from . import mask_attention as fwd
from . import mask_attention_backward as bwd
from .launcher import cdiv, next_power_of_2
from .mask_attention_tiles import candidates
from .target import matrix_unit, multiprocessors, per_target, precision

MIN_SPLIT_KEYS = 512  # merging a shorter split costs more than it gains
PROGRAMS = 2  # per multiprocessor, which few tiles should give when their keys are split
MERGE_M = 32  # rows of a program that merges splits
PACKED_M = 16  # packed rows at a time in the dkv kernel: its main loop then keeps the registers that it has without packed rows


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

    @property
    def contiguous(self) -> int:
        """The mode of kernels that cover all rows in contiguous tiles: packed rows have a launch of their own, which leaves no bias."""
        return fwd.PLAIN.value if self.mode == fwd.PACKED.value else self.mode


T = TypeVar("T")
MODES = {fwd.PLAIN.value: "plain", fwd.PACKED.value: "packed", fwd.CHECKED.value: "checked"}


@per_target
def _tuning(kernel: str, head_dim: int, dtype: torch.dtype, mode: int, length: str) -> tuple[str, list[autotune.Config]]:
    key = autotune.key(f"mask_attention_{kernel}", f"D{_block_d(head_dim)}", dtype, MODES[mode], length)
    return key, candidates(kernel, MODES[mode], _block_d(head_dim), dtype)


def _launch(kernel: str, q: Tensor, mode: int, run: Callable[[autotune.Config], T]) -> T:
    key, configs = _tuning(kernel, q.shape[-1], q.dtype, mode, autotune.length_class(q.shape[2]))
    return run(autotune.choose(key, configs, run))


def _block_d(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def _head_strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@per_target
def _constants(head_dim: int, dtype: torch.dtype, tma: bool) -> dict[str, Any]:
    return {"D": head_dim, "BLOCK_D": _block_d(head_dim), "TMA": tma, "PRECISION": precision(dtype)}


def _tma_ready(*tensors: Tensor) -> bool:
    """Descriptors need 16-byte alignment of base and strides, and a head dim that is a power of two from 16 to 128.

    They serve Hopper and sm_100, whose matrix units read shared memory. sm_120 has them too, but feeds its matrix unit from registers:
    there dkv spills 450 bytes with descriptors and nothing with pointers.
    """
    supported = matrix_unit() in ("wgmma", "tcgen05") and tensors[0].shape[-1] in (16, 32, 64, 128)
    return supported and all(map(_aligned, tensors))


def _aligned(x: Tensor) -> bool:
    batch, head, row, _ = x.stride()
    return x.data_ptr() % 16 == 0 and (batch | head | row) * x.element_size() % 16 == 0  # together: 16 is a power of two


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Tiles of `block` rows of one head of (B, H, N, D).

    The fields are set one by one, because the constructor checks again what `_tma_ready` has checked, in 5 us.
    """
    found = object.__new__(TensorDescriptor)
    found.base, found.shape, found.strides, found.block_shape = x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[-1]]
    return found


def _tiled(tensors: tuple[Tensor, Tensor], tma: bool) -> Callable[[int], tuple[Any, ...]]:
    """By the number of rows of a tile, how a kernel gets tensors whose tiles its loop reads: as descriptors (TMA), or as they are."""
    made: dict[int, tuple[Any, ...]] = {}

    def tiled(block: int) -> tuple[Any, ...]:
        if block not in made:
            made[block] = (_descriptor(tensors[0], block), _descriptor(tensors[1], block)) if tma else tensors
        return made[block]

    return tiled


def _vectors(query_gate: Tensor | None, key_bias: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and bias with unit stride along the tokens, as the kernels read them. Without a bias, `unread` takes their place."""
    if query_gate is None or key_bias is None:
        return unread, unread
    return query_gate.contiguous(), key_bias.contiguous()


def splits_for(tiles: int, keys: int) -> int:
    """Number of programs that share the keys of a tile: enough to fill the device, with at least MIN_SPLIT_KEYS keys each."""
    most = keys // MIN_SPLIT_KEYS
    return max(1, min(PROGRAMS * multiprocessors() // tiles, most)) if most > 1 else 1


def forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    q, k, v, query_gate, key_bias, layout, scale = args
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    rows = Rows.of(query_gate, layout)
    tma = _tma_ready(k, v)
    tiled, constants = _tiled((k, v), tma), _constants(head_dim, q.dtype, tma)
    out = empty_token_major(q)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    gate, bias = _vectors(query_gate, key_bias, lse)
    strides, vector_strides = _head_strides(q, k, v), (gate.stride(0), bias.stride(0))

    def split(count: int, config: autotune.Config) -> tuple[int, int]:
        """Tiles of `count` rows, over heads and batch, and programs that share the keys of each."""
        tiles = cdiv(count, config["BLOCK_M"])
        return tiles, splits_for(tiles * batch * heads, keys)

    def partial_results(splits: int, count: int) -> tuple[Tensor, Tensor]:
        out_parts = q.new_empty((splits * batch, heads, count, head_dim), dtype=torch.float32)
        return out_parts, q.new_empty((splits, batch, heads, count), dtype=torch.float32)

    def merge(parts: tuple[Tensor, Tensor], mode: int) -> None:
        splits, _, _, count = parts[1].shape
        launcher.launch(
            fwd.mask_attention_fwd_kernel_merge, (cdiv(count, MERGE_M) * batch * heads,),
            (*parts, out, lse),
            (batch * heads * count, *_head_strides(out), heads, queries, count, splits, rows.per_frame, rows.special),
            D=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=MERGE_M, ROWS=mode, num_warps=4,
        )  # fmt: skip

    def run(config: autotune.Config) -> None:
        tiles, splits = split(queries, config)
        target = (out, lse) if splits == 1 else partial_results(splits, queries)
        launcher.launch(
            fwd.mask_attention_fwd_kernel, (tiles * batch * heads, splits),
            (q, *tiled(config["BLOCK_N"]), gate, bias, *target),
            (*strides, *_head_strides(target[0]), *vector_strides, batch * heads * queries, tiles, heads, queries, keys, scale),
            ROWS=rows.contiguous, SPLIT=splits > 1, **constants,
            **config | {"SPECIALISED": tma and "SPECIALISED" in config},
        )  # fmt: skip
        if splits > 1:
            merge(target, rows.contiguous)

    def run_packed(config: autotune.Config) -> None:
        tiles, splits = split(rows.packed, config)
        target = partial_results(splits, rows.packed)
        launcher.launch(
            fwd.mask_attention_fwd_kernel_packed, (tiles * batch * heads, splits),
            (q, *tiled(config["BLOCK_N"]), gate, bias, *target),
            (*strides, *_head_strides(target[0]), *vector_strides, batch * heads * rows.packed,
             tiles, heads, keys, scale, rows.per_frame, rows.special, rows.packed), **constants, **config,
        )  # fmt: skip
        merge(target, rows.mode)

    _launch("fwd_kernel", q, rows.contiguous, run)
    if rows.packed:  # last: it overwrites what the contiguous tiles stored in the gated rows
        _launch("fwd_kernel_packed", q, rows.mode, run_packed)
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
    launcher.launch(
        bwd.mask_attention_bwd_kernel_preprocess, (cdiv(queries, 64) * batch * heads,),
        (out, d_out, lse, lse if d_lse is None else d_lse.contiguous(), delta, lse2),
        (*_head_strides(out, d_out), heads, queries, rows.per_frame, rows.special),
        D=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=64, ROWS=rows.mode, LSE_GRAD=d_lse is not None, num_warps=4,
    )  # fmt: skip

    d_q, d_k, d_v = empty_token_major(q), empty_token_major(k), empty_token_major(v)
    d_gate_heads, d_bias_heads = (q.new_empty((batch, heads, n), dtype=torch.float32) for n in (queries, keys))
    gate, bias = _vectors(query_gate, key_bias, lse)
    tma = _tma_ready(k, v)
    tiled, constants = _tiled((k, v), tma), _constants(head_dim, q.dtype, tma)
    strides, vector_strides = _head_strides(q, k, v, d_out), (gate.stride(0), bias.stride(0))
    packed_sizes = (rows.per_frame, rows.special, rows.packed)

    def run_dq(config: autotune.Config) -> None:
        tiles = cdiv(queries, config["BLOCK_M"])
        launcher.launch(
            bwd.mask_attention_bwd_kernel_dq, (tiles * batch * heads,),
            (q, *tiled(config["BLOCK_N"]), d_out, gate, bias, lse2, delta, d_q, d_gate_heads),
            (*strides, *_head_strides(d_q), *vector_strides, tiles, heads, queries, keys, scale),
            ROWS=rows.contiguous, **constants, **config,
        )  # fmt: skip

    def run_dq_packed(config: autotune.Config) -> tuple[Tensor, Tensor]:
        tiles = cdiv(rows.packed, config["BLOCK_M"])
        splits = splits_for(tiles * batch * heads, keys)
        parts = q.new_empty((splits, batch, heads, rows.packed, head_dim), dtype=torch.float32)
        gate_parts = q.new_empty((splits, batch, heads, rows.packed), dtype=torch.float32)
        launcher.launch(
            bwd.mask_attention_bwd_kernel_dq_packed, (tiles * batch * heads, splits),
            (q, *tiled(config["BLOCK_N"]), d_out, gate, bias, lse, delta, parts, gate_parts),
            (*strides, *vector_strides, batch * heads * rows.packed, tiles, heads, queries, keys, scale, *packed_sizes),
            **constants, **config,
        )  # fmt: skip
        return parts, gate_parts

    def run_dkv(config: autotune.Config) -> None:
        tma = _tma_ready(q, d_out)
        tiles = cdiv(keys, config["BLOCK_N"])
        launcher.launch(
            bwd.mask_attention_bwd_kernel_dkv, (tiles * batch * heads,),
            (*_tiled((q, d_out), tma)(config["BLOCK_M"]), q, d_out, k, v, gate, bias, lse, lse2, delta, d_k, d_v, d_bias_heads),
            (*strides, *_head_strides(d_k), *vector_strides, tiles, heads, queries, keys, scale, *packed_sizes),
            BLOCK_P=PACKED_M, ROWS=rows.mode, **_constants(head_dim, q.dtype, tma), **config,
        )  # fmt: skip

    _launch("bwd_kernel_dq", q, rows.contiguous, run_dq)
    _launch("bwd_kernel_dkv", q, rows.mode, run_dkv)
    if query_gate is None:
        return d_q, d_k, d_v, None, None
    if layout is None:
        return d_q, d_k, d_v, d_gate_heads.sum(1), d_bias_heads.sum(1)
    d_gate = torch.zeros_like(query_gate)
    if rows.packed:
        parts, gate_parts = _launch("bwd_kernel_dq_packed", q, rows.mode, run_dq_packed)
        frames, special = layout.frames, layout.special_tokens
        sums = parts.sum(0), gate_parts.sum((0, 2))
        for total, whole, dim in zip(sums, (d_q, d_gate), (2, 1), strict=True):
            by_frame = whole.unflatten(dim, (frames, layout.tokens_per_frame)).narrow(dim + 1, 0, special)
            by_frame.copy_(total.unflatten(dim, (frames, special)))
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
