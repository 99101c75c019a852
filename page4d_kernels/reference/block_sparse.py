"""Attention of patches over blocks of keys that their means choose, with all N x N logits in memory. To compare with `thin_attention`.

Source of the idea: Block-sparse global attention for efficient multi-view geometry transformers, arXiv 2509.07120.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import TokenLayout
from .mask_attention import mask_attention


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    *,
    blocks: tuple[int, int],
    share: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, D) in q's dtype, computed in float64, and the fraction of the pairs of patches that is computed, a number.

    The patches, in order and without the special tokens, form query blocks of `blocks[0]` and key blocks of `blocks[1]`. With the means of
    their queries and keys, each query block of each head ranks the key blocks by softmax(mean q * mean k * scale). It keeps the fewest
    that together reach `share`, and at least the fraction `floor` of all. Patch rows see the special keys and the kept blocks. Special
    rows are dense, with the mask: softmax(q k^T * scale + r c^T) v.
    """
    q64, k64, v64 = (x.to(torch.float64) for x in (q, k, v))
    vectors = [None if x is None else x.to(torch.float64) for x in (query_gate, key_bias)]
    dense, _ = mask_attention(q64, k64, v64, vectors[0], vectors[1], scale)
    special = torch.arange(layout.tokens, device=q.device) % layout.tokens_per_frame < layout.special_tokens
    patches = (~special).nonzero()[:, 0]
    query_block, key_block = (torch.arange(len(patches), device=q.device) // size for size in blocks)
    importance = _means(q64[:, :, patches], query_block) @ _means(k64[:, :, patches], key_block).mT * scale
    seen = _chosen(importance.softmax(-1), share, floor)[:, :, query_block][..., key_block]  # (B, H, P, P)
    logits = q64[:, :, patches] @ k64.mT * scale
    columns = logits[..., patches].masked_fill(~seen, -math.inf)
    rows = logits.index_copy(3, patches, columns).softmax(-1) @ v64
    return dense.index_copy(2, patches, rows).to(q.dtype), seen.double().mean()


def _means(x: Tensor, block: Tensor) -> Tensor:
    """(B, H, blocks, D): the mean of each block of x (B, H, P, D)."""
    counts = block.bincount()
    sums = x.new_zeros(*x.shape[:2], len(counts), x.shape[3]).index_add(2, block, x)
    return sums / counts[:, None]


def _chosen(weights: Tensor, share: float, floor: float) -> Tensor:
    """Which weights (..., n), that sum to 1, are kept, as bool."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(weights.shape[-1], device=weights.device)
    kept = (before < share) | (rank < math.ceil(floor * weights.shape[-1]))
    return torch.zeros_like(kept).scatter(-1, order, kept)
