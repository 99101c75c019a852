"""Auxiliary supervision of correspondence, with which a model learns from scratch how frames relate.

With camera and depth losses alone, training from scratch stays at a plateau: a token gains nothing from finding its match in another frame
until later layers use it. Ground-truth tracks supervise where attention looks, and which displacement the tokens encode. None of this is
part of the saved model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from page4d_kernels import qk_norm_rope

from ..data.sample import Sample
from ..layers import Block, LayerNorm, Linear
from ..layers.attention import Attention, rope
from ..model import Page4D


class Matching(nn.Module):
    """Records activations during the forward pass of `model`; `forward` then returns the loss of that pass.

    For a point that is visible in frame 0 (in patch p0) and in frame s (in patch ps), the loss is the sum of

    - the cross-entropy between the attention of ps over all tokens of the sequence and the target p0, in head 0 of the last two global
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
        """The loss (fp32 scalar) of the model's last forward pass, whose ground truth is `target`; 0 without a visible point."""
        assert target.tracks is not None and target.track_visible is not None
        frames, (height, width) = target.images.shape[1], target.images.shape[-2:]
        patch, special = self.config.patch_size, self.config.special_tokens
        grid = (height // patch, width // patch)
        cell = ((target.tracks + 0.5) / patch).floor().long()
        token = special + cell[..., 1].clamp(0, grid[0] - 1) * grid[1] + cell[..., 0].clamp(0, grid[1] - 1)  # (B, S, N), in a frame
        seen = target.track_visible[:, :1] & target.track_visible[:, 1:]
        if not seen.any():
            return self.displacement.bias.sum() * 0
        answer = token[:, :1].expand(-1, frames - 1, -1)[seen]
        losses = [F.cross_entropy(self._scores(i, grid, frames, token)[seen], answer) for i in range(len(self.attention))]
        predicted = self.displacement(self.norm(_at(self._seen["last"][:, 1:].flatten(-2).float(), token[:, 1:])))
        wanted = (target.tracks[:, :1] - target.tracks[:, 1:]) / patch
        return torch.stack(losses).mean() + (predicted - wanted)[seen].abs().mean()

    def _scores(self, i: int, grid: tuple[int, int], frames: int, token: Tensor) -> Tensor:
        """Head 0's scores (B, S - 1, N, number of tokens) of the queries at `token` (B, S, N) in frames 1, 2, ..."""
        attention, config = self.attention[i], self.config
        assert attention.q_norm is not None and attention.k_norm is not None
        head_dim = config.embed_dim // config.num_heads
        qkv = rearrange(self._seen[i].float(), "b n (three h c) -> b n three h c", three=3, c=head_dim)[:, :, :, :1]
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
        queries = _at(rearrange(q[:, 0], "b (s p) c -> b s p c", s=frames)[:, 1:], token[:, 1:])
        return torch.einsum("bsnc,bmc->bsnm", queries, k[:, 0]) * head_dim**-0.5


def _at(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens (B, S, N, C) at `index` (B, S, N) of `tokens` (B, S, P, C)."""
    return tokens.gather(2, index[..., None].expand(-1, -1, -1, tokens.shape[-1]))
