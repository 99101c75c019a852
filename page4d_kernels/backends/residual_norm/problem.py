"""What a backend of `residual_norm` is told about a call before it serves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ResidualNormProblem:
    device: str
    dtype: torch.dtype  # the widest of what goes in and what comes out
    rows: int
    channels: int
    needs_grad: bool = False
