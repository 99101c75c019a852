"""Description of a `residual_norm` call, from which a backend decides whether it can serve it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ResidualNormProblem:
    device: str
    dtype: torch.dtype  # the widest dtype among inputs and outputs
    rows: int
    channels: int
    needs_grad: bool = False
    branch: torch.dtype = torch.float32

    kind = ""

    @property
    def length(self) -> int:
        """Tokens, by which `qualify` sorts problems into classes."""
        return self.rows

    @property
    def variant(self) -> str:
        """What it judges apart."""
        return f"{str(self.branch).removeprefix('torch.')} branch"

    @classmethod
    def typical(cls, device: str) -> ResidualNormProblem:
        """Inference at the official size: 2 frames of 336 x 518 pixels, 24 x 37 patches and 5 special tokens each."""
        return cls(device, torch.float32, 2 * 893, 1024)
