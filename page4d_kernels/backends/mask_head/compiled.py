"""Shared by the compiled backends: the output, fp32 parameters, and the call with addresses, sizes and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...reference.mask_head import MIN_STD


def forward(
    function: str,
    tokens: Tensor,
    parameters: list[Tensor],
    grid: tuple[int, int],
    special_tokens: int,
    *working_space: Any,
    launch_args: tuple[int, ...],
) -> Tensor:
    """Call `function` of the library. `launch_args` are its last arguments (dtype, threads or device, ...)."""
    batch, frames, per_frame, channels = tokens.shape
    weights = [native.fp32(parameter) for parameter in parameters]
    out = torch.empty(batch, frames * per_frame, dtype=torch.float32, device=tokens.device)
    getattr(native.library(), function)(
        tokens.data_ptr(), [weight.data_ptr() for weight in weights], out.data_ptr(), *working_space,
        (batch, frames, channels, weights[2].shape[0], special_tokens, *grid), tokens.stride(), MIN_STD, *launch_args,
    )  # fmt: skip
    return out
