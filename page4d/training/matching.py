"""Auxiliary supervision of correspondence: what lets a model that starts from scratch learn how frames relate.

Losses of camera and depth alone leave global attention at a plateau: no token has a reason to look for its counterpart until others make
use of it. Points that are followed through the sequence tell the attention where to look, and the tokens what to keep of what it found.
Nothing of this is part of the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from page4d_kernels import qk_norm_rope

from ..data.sample import Sample
from ..layers import Block, LayerNorm, Linear
from ..layers.attention import Attention, rope
from ..model import Page4D


class Matching(nn.Module):
    """Reads along in a model's forward pass; afterwards `forward` gives the loss.

    For a point that frame 0 and frame s both see, with the patches p0 and ps that it falls into, the sum of

    - the cross-entropy of the attention of ps, over all tokens of the sequence, with p0 as the answer: head 0 of the last two global
      blocks of the first half, averaged;
    - the L1 error, in patches, between the true displacement from frame s to frame 0 and a linear prediction from the last-layer token
      at ps.
    """

    def __init__(self, model: Page4D):
        super().__init__()
        self.config = config = model.config
        first = max(config.depth // 2 - 2, 0)
        blocks = list(model.aggregator.global_blocks)[first : first + 2]
        self.attention: list[Attention] = [block.attn for block in blocks if isinstance(block, Block)]
        self.norm, self.displacement = LayerNorm(2 * config.embed_dim), Linear(2 * config.embed_dim, 2)
        self._seen: dict[Any, Tensor] = {}
        for i, attention in enumerate(self.attention):
            attention.qkv.register_forward_hook(lambda module, inputs, output, i=i: self._seen.__setitem__(i, output))
        model.aggregator.register_forward_hook(lambda module, inputs, output: self._seen.__setitem__("last", output.layers[-1]))

    def forward(self, target: Sample) -> Tensor:
        assert target.tracks is not None and target.track_visible is not None
        frames, (height, width) = target.images.shape[1], target.images.shape[-2:]
        patch, special = self.config.patch_size, self.config.special_tokens
        grid = (height // patch, width // patch)
        cell = ((target.tracks + 0.5) / patch).floor().long()
        token = special + cell[..., 1].clamp(0, grid[0] - 1) * grid[1] + cell[..., 0].clamp(0, grid[1] - 1)  # (B, S, N), within its frame
        seen = target.track_visible[:, :1] & target.track_visible[:, 1:]
        if not seen.any():
            return self.displacement.bias.sum() * 0
        answer = token[:, :1].expand(-1, frames - 1, -1)[seen]
        losses = [F.cross_entropy(self._scores(i, grid, frames, token)[seen], answer) for i in range(len(self.attention))]
        way = self.displacement(self.norm(_at(self._seen["last"][:, 1:].flatten(-2).float(), token[:, 1:])))
        wanted = (target.tracks[:, :1] - target.tracks[:, 1:]) / patch
        return torch.stack(losses).mean() + (way - wanted)[seen].abs().mean()

    def _scores(self, i: int, grid: tuple[int, int], frames: int, token: Tensor) -> Tensor:
        """Head 0's scores (B, S - 1, N, tokens of the sequence) of the queries at `token` in frames 1, 2, ..."""
        attention, config = self.attention[i], self.config
        assert attention.q_norm is not None and attention.k_norm is not None
        head_dim = config.embed_dim // config.num_heads
        qkv = self._seen[i].float().unflatten(-1, (3, attention.num_heads, head_dim))[:, :, :, :1]
        table = rope(grid, config.special_tokens, head_dim, config.rope_base, qkv.device, torch.float32)
        q, k, _ = qk_norm_rope(
            qkv,
            attention.q_norm.weight,
            attention.q_norm.bias,
            attention.k_norm.weight,
            attention.k_norm.bias,
            table.cos,
            table.sin,
            grid=grid,
            special_tokens=config.special_tokens,
            eps=attention.q_norm.eps,
        )
        queries = _at(q[:, 0].unflatten(1, (frames, -1))[:, 1:], token[:, 1:])
        return torch.einsum("bsnc,bmc->bsnm", queries, k[:, 0]) * head_dim**-0.5


def _at(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, S, P, C) at index (B, S, N): (B, S, N, C)."""
    return tokens.gather(2, index[..., None].expand(-1, -1, -1, tokens.shape[-1]))
