"""Mask-modulated attention built on any plain attention: all rows without the bias, then the gated rows again with it.

Only frames * special_tokens rows are gated, about half a percent. Computing them twice costs little. Computing them in fp32 (`chunked`)
is more accurate than folding the bias into the head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .problem import AttentionArgs

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def around(plain: Attention) -> Callable[..., Tensor]:
    """The `forward` of a backend that computes `plain(q, k, v, scale)` and replaces its gated rows."""
    return functools.partial(_attend, plain)


def _attend(plain: Attention, args: AttentionArgs) -> Tensor:
    """Without a layout every row may be gated, so `chunked` computes all rows with the bias."""
    q, k, v, query_gate, key_bias, layout, scale = args
    if query_gate is None or key_bias is None:
        return plain(q, k, v, scale)
    biased = torch.ops.page4d.mask_attention
    if layout is None:
        return biased(q, k, v, query_gate, key_bias, None, scale, "chunked")[0]
    out = plain(q, k, v, scale)
    if layout.special_tokens == 0:
        return out
    rows, _ = biased(layout.special(q, 2), k, v, layout.special(query_gate, 1), key_bias, None, scale, "chunked")
    shape = (layout.frames, layout.tokens_per_frame)
    rows = rows.unflatten(2, (layout.frames, layout.special_tokens))
    if out.requires_grad:  # autograd has saved `out`, so it must not change
        return torch.slice_scatter(out.unflatten(2, shape), rows, 3, 0, layout.special_tokens).flatten(2, 3)
    out.unflatten(2, shape).narrow(3, 0, layout.special_tokens).copy_(rows)
    return out
