"""Shared by the compiled backends: outputs, and the arguments that describe a call by addresses, sizes and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...layout import empty_token_major
from .problem import AttentionArgs


def outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised output (token-major) and log-sum-exp."""
    return empty_token_major(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def unit_stride(x: Tensor | None) -> Tensor | None:
    """Gate or bias with unit stride along the tokens, as the kernels read it. The caller must keep it alive while the kernel runs."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def arguments(args: AttentionArgs, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    q, k, v, query_gate, key_bias, _, scale = args
    batch, heads, queries, head_dim = q.shape
    addresses = tuple(0 if x is None else x.data_ptr() for x in (q, k, v, query_gate, key_bias, out, lse))
    strides = [x.stride()[:3] for x in (q, k, v, out)]
    vectors = [0 if x is None else x.stride(0) for x in (query_gate, key_bias)]
    return addresses, (batch, heads, queries, k.shape[2], head_dim), strides, *vectors, scale
