"""The dynamics-aware mask: its head and the schedule of its strength in training."""

from __future__ import annotations

import math

from torch import Tensor, nn

from page4d_kernels import mask_head


class MaskHead(nn.Module):
    """Tokens (B, S, P, C) -> key bias (B, S*P) in (-1/2, 1/2), 0 at special tokens."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.head0 = nn.Sequential(depthwise, nn.GELU(), nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, 1, 1))

    def forward(self, tokens: Tensor, grid: tuple[int, int], special_tokens: int) -> Tensor:
        depthwise, _, hidden, _, out = self.head0
        parameters = [x for layer in (depthwise, hidden, out) for x in (layer.get_parameter("weight"), layer.get_parameter("bias"))]
        return mask_head(tokens, *parameters, grid=grid, special_tokens=special_tokens)


def mask_schedule(step: float, hold_start: float, hold_end: float, strength: float = 64.0) -> float:
    """Strength of the mask at a training step: full before `hold_start`, 0 from `hold_end` on, a half cosine in between."""
    if step < hold_start:
        return strength
    if step >= hold_end:
        return 0.0
    return strength * (1 + math.cos(math.pi * (step - hold_start) / (hold_end - hold_start))) / 2
