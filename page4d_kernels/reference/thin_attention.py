"""Attention in which patch rows see some of the keys, each of them for several, with all N x N logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import TokenLayout
from .mask_attention import mask_attention


def thin_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    layout: TokenLayout,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Output (B, H, N, D) in q's dtype, computed in float64.

    Special rows: softmax(q k^T * scale + r c^T) v over all keys. Patch rows: softmax(q k^T * scale + log n) v, where n = `counts` (N, N) is
    how many tokens the key of a column stands for in the row, and 0 leaves it out.
    """
    q64, k64, v64 = (x.to(torch.float64) for x in (q, k, v))
    vectors = [None if x is None else x.to(torch.float64) for x in (query_gate, key_bias)]
    dense, _ = mask_attention(q64, k64, v64, vectors[0], vectors[1], scale)
    logits = (q64 @ k64.transpose(-1, -2)) * scale + counts.to(torch.float64).log()
    thin = logits.softmax(-1) @ v64
    special = torch.arange(layout.tokens, device=q.device) % layout.tokens_per_frame < layout.special_tokens
    return torch.where(special[:, None], dense, thin).to(q.dtype)
