"""Launching the mask head's kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..reference.mask_head import MIN_STD
from . import mask_head as kernels

BLOCK_P, BLOCK_C = 32, 32
STATISTICS_P = 64


def forward(tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> Tensor:
    batch, frames, per_frame, channels = tokens.shape
    patches, hidden = grid[0] * grid[1], parameters[2].shape[0]
    mean, rstd = (torch.empty(batch * frames, channels, dtype=torch.float32, device=tokens.device) for _ in range(2))
    out = torch.empty(batch, frames * per_frame, dtype=torch.float32, device=tokens.device)
    kernels.statistics[(batch * frames, triton.cdiv(channels, BLOCK_C))](
        tokens, mean, rstd, *tokens.stride(), frames, channels, special_tokens, patches, MIN_STD,
        BLOCK_P=STATISTICS_P, BLOCK_C=BLOCK_C, num_warps=4,
    )  # fmt: skip
    weights = [parameter.to(torch.float32).contiguous() for parameter in parameters]
    kernels.forward[(triton.cdiv(patches, BLOCK_P), batch * frames)](
        tokens, mean, rstd, *weights, out, *tokens.stride(), frames, channels, hidden, special_tokens, *grid,
        BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, BLOCK_H=max(16, triton.next_power_of_2(hidden)),
        BLOCK_S=triton.next_power_of_2(max(special_tokens, 1)), PRECISION="tf32x3", num_warps=8,
    )  # fmt: skip
    return out
