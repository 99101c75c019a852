"""Initial weights for training from scratch.

The official initialisation is made for starting from a trained encoder: positions hardly differ at first, and the first frame's tokens
are those of the others. A model without that start needs hundreds of steps to learn them, before it can learn anything else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..layers import Block
from ..model import Page4D

AMPLITUDE = 0.5  # of position embeddings and special tokens, near that of embedded patches


@torch.no_grad()
def start_from_scratch(model: Page4D) -> None:
    """Position embeddings are sines, special tokens differ, and global attention starts by looking for alike tokens (k as q)."""
    aggregator, dim = model.aggregator, model.config.embed_dim
    encoder = aggregator.patch_embed
    encoder.pos_embed[0, 1:] = AMPLITUDE * _sines(encoder.position_grid, dim)
    for token in (aggregator.camera_token, aggregator.register_token):
        nn.init.normal_(token, std=AMPLITUDE)
    for block in aggregator.global_blocks:
        assert isinstance(block, Block)
        for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
            parameter[dim : 2 * dim] = parameter[:dim]


def _sines(side: int, dim: int) -> Tensor:
    """(side^2, dim): sine and cosine of x and y, from a quarter turn across the grid up to a turn in six patches."""
    rate = math.pi / 2 / side * torch.logspace(0, math.log2(side / 1.5), dim // 4, base=2)
    angle = torch.arange(side)[:, None] * rate
    line = torch.cat([angle.sin(), angle.cos()], -1)
    return torch.cat([line.expand(side, side, -1), line[:, None].expand(side, side, -1)], -1).flatten(0, 1)
