"""Mask-modulated attention out of any plain attention: all rows without the bias, then the gated rows again with it.

Only frames * special_tokens rows have a gate, half a percent of them, so doing those twice costs next to nothing, and doing them in
fp32 (`chunked`) makes them more exact than folding the bias into the head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...layout import TokenLayout

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def attend(
    plain: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    layout: TokenLayout | None,
    scale: float,
) -> Tensor:
    """`plain(q, k, v, scale)` with its gated rows replaced. Without a layout every row may be gated, and all go the biased way."""
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
    if out.requires_grad:  # autograd has kept `out`: it may not change
        return torch.slice_scatter(out.unflatten(2, shape), rows, 3, 0, layout.special_tokens).flatten(2, 3)
    out.unflatten(2, shape).narrow(3, 0, layout.special_tokens).copy_(rows)
    return out
