"""What a backend of `qk_norm_rope` is told about a call before it serves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QkNormRopeProblem:
    device: str
    dtype: torch.dtype
    batch: int
    tokens: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    special_tokens: int
    needs_grad: bool = False  # of the projection or any parameter
