"""Mask-modulated attention built on any plain attention: all rows without the bias, then the gated rows again with it.

Only frames * special_tokens rows are gated, about half a percent. The record of qualified kernels says which backend computes them. Without
a record it is `chunked`, plain PyTorch in fp32. docs/attention.md counts what each costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import registries
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
    if layout is None:
        return torch.ops.page4d.mask_attention(q, k, v, query_gate, key_bias, None, scale, "chunked")[0]
    out = plain(q, k, v, scale)
    if layout.special_tokens == 0:
        return out
    rows = _gated(layout.special(q, 2), k, v, layout.special(query_gate, 1), key_bias, scale)
    shape = (layout.frames, layout.tokens_per_frame)
    rows = rows.unflatten(2, (layout.frames, layout.special_tokens))
    if out.requires_grad:  # autograd has saved `out`, so it must not change
        return torch.slice_scatter(out.unflatten(2, shape), rows, 3, 0, layout.special_tokens).flatten(2, 3)
    out.unflatten(2, shape).narrow(3, 0, layout.special_tokens).copy_(rows)
    return out


def _gated(q: Tensor, k: Tensor, v: Tensor, query_gate: Tensor, key_bias: Tensor, scale: float) -> Tensor:
    """All rows with the bias, by the fastest qualified backend that runs inside the operator."""
    from ...ops.mask_attention import describe

    problem = describe(q, k, v, query_gate, key_bias)
    names = registries()["mask_attention"].qualified(problem)
    name = next((name for name in names if registries()["mask_attention"].get(name).backward is not None), "chunked")
    return torch.ops.page4d.mask_attention(q, k, v, query_gate, key_bias, None, scale, name)[0]
