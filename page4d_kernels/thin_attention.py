"""Attention across frames in which patches see fewer keys: some patches of each frame, or their own frame alone.

Special tokens see all keys in both cases, with the mask if there is one: for them nothing is approximate. Which keys are kept depends on
the layout alone, not on the data. So there is nothing to match or to wait for, and the same call gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import TokenLayout
from .ops._checks import expect_tensor, values_can_be_read
from .ops.mask_attention import mask_attention
from .reference import accumulation_dtype

FIRST_FRAME = 0  # its patches are all kept: the world is that of its camera


@dataclass(frozen=True, eq=False)
class KeySelection:
    """The keys that patch rows see, K of N, and for how many tokens each of them stands. See `select_keys`."""

    layout: TokenLayout
    kept: Tensor  # (K,) int64, ascending
    log_counts: Tensor  # (K,) fp64: log of the number of tokens; 0 for special tokens and the first frame

    def to(self, device: torch.device) -> KeySelection:
        return KeySelection(self.layout, self.kept.to(device), self.log_counts.to(device))


def select_keys(
    layout: TokenLayout, grid: tuple[int, int], cell: tuple[int, int], shift: int = 0, device: torch.device | None = None
) -> KeySelection:
    """Keep all special tokens, all patches of the first frame, and one patch of every cell of the other frames.

    Args:
        layout: of the tokens.
        grid: rows and columns of the patches of a frame.
        cell: rows and columns of a cell. Where they do not divide the grid, some cells are larger, so that no more keys are kept.
        shift: where in its cell the kept patch of the first thinned frame is. From frame to frame it moves on by one, row by row.
        device: of the indices.

    Raises:
        ValueError: the grid does not fit the layout, or a cell has no patch.
    """
    rows, columns = grid
    if rows * columns + layout.special_tokens != layout.tokens_per_frame:
        raise ValueError(f"a grid of {rows} x {columns} patches does not fit {layout}")
    if min(cell) < 1:
        raise ValueError(f"a cell needs at least one row and one column, not {cell[0]} x {cell[1]}")
    tops, lefts = (_edges(side, least) for side, least in zip(grid, cell, strict=True))
    kept, counts = [], []
    for frame in range(layout.frames):
        start = frame * layout.tokens_per_frame
        kept.append(torch.arange(start, start + layout.special_tokens))
        counts.append(torch.ones(layout.special_tokens))
        patches = start + layout.special_tokens
        if frame == FIRST_FRAME:
            kept.append(torch.arange(patches, patches + rows * columns))
            counts.append(torch.ones(rows * columns))
            continue
        top, left = torch.meshgrid(tops[:-1], lefts[:-1], indexing="ij")
        tall, wide = torch.meshgrid(tops.diff(), lefts.diff(), indexing="ij")
        place = (frame - 1 + shift) % (tall * wide)
        chosen = (top + place // wide) * columns + left + place % wide
        chosen, order = chosen.flatten().sort()
        kept.append(patches + chosen)
        counts.append((tall * wide).flatten()[order].float())
    return KeySelection(layout, torch.cat(kept), torch.cat(counts).double().log()).to(device or torch.device("cpu"))


def _edges(side: int, least: int) -> Tensor:
    """Where cells of at least `least` begin along a side, and its end: as many as fit, as equal as possible."""
    count = max(1, side // least)
    return torch.arange(count + 1) * side // count


def thin_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: KeySelection,
    query_gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
    dense_rows: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which patch rows see the kept keys, each with the weight of the n tokens that it stands for:

        patch row i:   softmax_j over kept keys (q_i k_j * scale + log n_j) v_j
        special row i: softmax_j over all keys  (q_i k_j * scale + r_i c_j) v_j

    With cells of one patch all keys are kept, and the result is that of `mask_attention` up to rounding. The patch rows cost
    `len(selection.kept)` / N of dense ones. Differentiable in q, k, v, r and c if the backend is.

    Args:
        q, k, v: (B, H, N, D) with the N tokens of the selection's layout, see `mask_attention`.
        query_gate, key_bias: r and c (B, N), see `mask_attention`; r is zero outside the special tokens.
        dense_rows: (R,) int64: patch rows that are also computed over all keys, to measure what is lost. They join the special rows, so
            that k and v are read only once for both.

    Returns:
        (B, H, N, D) in q's dtype. With `dense_rows` a pair: that, and the dense rows (B, H, R, D).

    Raises:
        TypeError, ValueError, BackendError: see `mask_attention`.
    """
    if not isinstance(selection, KeySelection):
        raise TypeError(f"the selection must be a KeySelection, see select_keys, not {type(selection).__name__}")
    _check(q, selection.layout, dense_rows)
    dtype = accumulation_dtype(q.dtype)
    keys, values = (x.index_select(2, selection.kept) for x in (k, v))
    ones = torch.ones(q.shape[0], q.shape[2], dtype=dtype, device=q.device)
    weights = selection.log_counts.to(dtype).expand(q.shape[0], -1)
    out = mask_attention(q, keys, values, ones, weights, scale=scale, backend=backend)
    assert isinstance(out, Tensor)
    return _with_special_rows(out, q, k, v, selection.layout, query_gate, key_bias, scale, backend, dense_rows)


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    query_gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
    dense_rows: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which patch rows see the tokens of their own frame, and special rows see all, as in `thin_attention`."""
    _check(q, layout, dense_rows)
    frames = [x.unflatten(2, (layout.frames, layout.tokens_per_frame)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out = mask_attention(*frames, scale=scale, backend=backend)
    assert isinstance(out, Tensor)
    out = out.unflatten(0, (q.shape[0], layout.frames)).transpose(1, 2).flatten(2, 3)
    return _with_special_rows(out, q, k, v, layout, query_gate, key_bias, scale, backend, dense_rows)


def _check(q: Tensor, layout: TokenLayout, dense_rows: Tensor | None) -> None:
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"the layout must be a TokenLayout, not {type(layout).__name__}")
    if q.dim() != 4 or q.shape[2] != layout.tokens:
        raise ValueError(f"q must be (B, H, {layout.tokens}, D) to fit {layout}, not {tuple(q.shape)}")
    if dense_rows is None:
        return
    expect_tensor("dense_rows", dense_rows, 1, "(R,)")
    if dense_rows.dtype != torch.int64 or dense_rows.device != q.device or len(dense_rows) == 0:
        raise ValueError(
            f"dense_rows must be at least one int64 on {q.device}, not {len(dense_rows)} {dense_rows.dtype} on {dense_rows.device}"
        )
    if values_can_be_read(dense_rows):
        special = dense_rows % layout.tokens_per_frame < layout.special_tokens
        if bool((special | (dense_rows < 0) | (dense_rows >= layout.tokens)).any()):
            raise ValueError(f"dense_rows must be rows of patches, see {layout}")


def _with_special_rows(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float | None,
    backend: str | None,
    dense_rows: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`out` with its special rows replaced by dense ones, and `dense_rows` computed densely if there are any."""
    count = layout.frames * layout.special_tokens
    if count == 0 and dense_rows is None:
        return out
    rows, gate = layout.special(q, 2), None if query_gate is None else layout.special(query_gate, 1)
    if dense_rows is not None:
        rows = torch.cat([rows, q.index_select(2, dense_rows)], 2)
        gate = None if gate is None else F.pad(gate, (0, len(dense_rows)))  # patches are not gated
    dense = mask_attention(rows, k, v, gate, key_bias, scale=scale, backend=backend)
    assert isinstance(dense, Tensor)
    if count:
        out = _replaced(out, dense[:, :, :count], layout)
    return out if dense_rows is None else (out, dense[:, :, count:])


def _replaced(out: Tensor, special: Tensor, layout: TokenLayout) -> Tensor:
    """`out` with the special rows (B, H, frames * special tokens, D)."""
    special = special.unflatten(2, (layout.frames, layout.special_tokens))
    shape = (layout.frames, layout.tokens_per_frame)
    if out.requires_grad:  # autograd has saved `out`, so it must not change
        return torch.slice_scatter(out.unflatten(2, shape), special, 3, 0, layout.special_tokens).flatten(2, 3)
    out.unflatten(2, shape).narrow(3, 0, layout.special_tokens).copy_(special)
    return out
