"""Description of a `mask_head` call, from which a backend decides whether it can serve it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MaskHeadProblem:
    device: str
    dtype: torch.dtype
    batch: int
    frames: int
    grid: tuple[int, int]
    special_tokens: int
    channels: int
    hidden: int
    needs_grad: bool = False  # of any parameter

    variant = kind = ""  # `qualify` sorts these problems by dtype, direction and length only

    @property
    def length(self) -> int:
        return self.frames * (self.special_tokens + self.grid[0] * self.grid[1])

    @classmethod
    def typical(cls, device: str) -> MaskHeadProblem:
        """Inference at the official size: 2 frames of 336 x 518 pixels, 24 x 37 patches and 5 special tokens each."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return cls(device, dtype, 1, 2, (24, 37), 5, 1024, 256)
