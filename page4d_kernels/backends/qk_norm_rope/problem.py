"""Description of a `qk_norm_rope` call, from which a backend decides whether it can serve it."""

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

    kind = ""

    @property
    def length(self) -> int:
        """Tokens, by which `qualify` sorts problems into classes."""
        return self.tokens

    @property
    def variant(self) -> str:
        """What it judges apart."""
        return f"head dim {self.head_dim}"

    @classmethod
    def typical(cls, device: str) -> QkNormRopeProblem:
        """Inference at the official size: 2 frames of 336 x 518 pixels, 24 x 37 patches and 5 special tokens each."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return cls(device, dtype, 1, 2 * 893, 16, 64, (24, 37), 5)
