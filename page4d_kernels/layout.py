"""Layout of tokens: how a sequence is divided into frames, and how outputs are laid out in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """`frames` frames of `tokens_per_frame` tokens; each frame begins with `special_tokens` special tokens.

    Given to `mask_attention`, it is a promise that the query gate is zero outside the special tokens. Backends then apply the bias to
    frames * special_tokens rows only, and the gate's gradient is 0 elsewhere. PAGE4D_DEBUG=1 checks the promise.
    """

    frames: int
    tokens_per_frame: int
    special_tokens: int

    def __post_init__(self) -> None:
        if self.frames < 1 or self.tokens_per_frame < 1:
            raise ValueError(f"{self}: frames and tokens_per_frame must be at least 1")
        if not 0 <= self.special_tokens <= self.tokens_per_frame:
            raise ValueError(f"{self}: special_tokens must be between 0 and tokens_per_frame")

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    def special(self, x: Tensor, dim: int) -> Tensor:
        """The special tokens of `x` along `dim`, frames * special_tokens in a row. Copies only these."""
        dim %= x.dim()
        return x.unflatten(dim, (self.frames, self.tokens_per_frame)).narrow(dim + 1, 0, self.special_tokens).flatten(dim, dim + 1)

    def only_special(self, x: Tensor) -> Tensor:
        """`x` (B, N) with 0 outside the special tokens."""
        special = torch.arange(self.tokens, device=x.device) % self.tokens_per_frame < self.special_tokens
        return x.where(special, 0.0)


def to_token_major(x: Tensor) -> Tensor:
    """`x` (B, H, N, D) stored as (B, N, H, D), the memory layout of all outputs: the projections around attention use it."""
    by_token = x.transpose(1, 2)
    return x if by_token.is_contiguous() else by_token.contiguous().transpose(1, 2)


def empty_token_major(like: Tensor) -> Tensor:
    """An uninitialised (B, H, N, D) tensor stored as (B, N, H, D), with the shape, dtype and device of `like`."""
    _, heads, tokens, head_dim = like.shape
    strides = (tokens * heads * head_dim, head_dim, heads * head_dim, 1)
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
