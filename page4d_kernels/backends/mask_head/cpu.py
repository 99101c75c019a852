"""Our compiled CPU kernels (csrc/cpu/head.h). Backward: the reference's formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...reference.mask_head import MIN_STD, mask_head_backward
from .. import native_limits
from ..registry import Backend


def _forward(tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> Tensor:
    batch, frames, per_frame, channels = tokens.shape
    weights = [native.fp32(parameter) for parameter in parameters]
    out = torch.empty(batch, frames * per_frame, dtype=torch.float32)
    native.library().mask_head(
        tokens.data_ptr(), [weight.data_ptr() for weight in weights], out.data_ptr(),
        (batch, frames, channels, weights[2].shape[0], special_tokens, *grid), tokens.stride(), MIN_STD, *native.common(tokens),
    )  # fmt: skip
    return out


BACKEND = Backend(
    "cpu",
    "our compiled kernels; backward by PyTorch",
    _forward,
    mask_head_backward,
    why_not=native_limits.limits,
    missing=native_limits.missing,
    passed_over=native_limits.plain_loops,
)
