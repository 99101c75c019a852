"""Shared by the compiled backends: outputs, fp32 parameters, and the call with addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import native


def forward(function: str, launch_args: Callable[[Tensor], tuple[int, ...]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of a backend. It calls `function` of the library; `launch_args(qkv)` gives the last arguments (dtype, threads, ...)."""
    return partial(_forward, function, launch_args)


def _forward(
    function: str,
    launch_args: Callable[[Tensor], tuple[int, ...]],
    qkv: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *parameters, grid, special, eps = rest
    batch, tokens, _, heads, head_dim = qkv.shape
    q, k = (torch.empty(batch, heads, tokens, head_dim, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    vectors = [native.fp32(x) for x in parameters]  # weights and biases of q and k, cos, sin
    sizes = (batch, tokens, heads, head_dim, special + grid[0] * grid[1], special, grid[1])
    stride = (qkv.stride(0), qkv.stride(1), qkv.stride(2), qkv.stride(3))
    addresses = [x.data_ptr() for x in vectors]
    with torch.cuda.device_of(qkv):  # restores the caller's current device afterwards
        getattr(native.library(), function)(qkv.data_ptr(), addresses, q.data_ptr(), k.data_ptr(), sizes, stride, eps, *launch_args(qkv))
    return q, k
