"""What a backend of `mask_head` is told about a call before it serves it."""

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
