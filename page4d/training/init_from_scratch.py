"""Initial weights for training from scratch.

The official initialisation assumes a trained encoder. Its position embeddings hardly differ, and the special tokens of the first frame
equal those of the other frames. Without a trained encoder, a model spends hundreds of steps on learning both before anything else.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ..layers import Block
from ..model import Page4D

AMPLITUDE = 0.5  # of position embeddings and special tokens; close to that of embedded patches


@torch.no_grad()
def start_from_scratch(model: Page4D) -> None:
    """Initialise `model` in place: sine position embeddings, different special tokens, and equal q and k weights in global attention.

    With equal q and k weights a token first attends to the tokens that are most similar to it.
    """
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
    """Sines and cosines of x and y (side^2, dim). The wavelengths go from four grid sides down to six patches."""
    rate = math.pi / 2 / side * torch.logspace(0, math.log2(side / 1.5), dim // 4, base=2)
    angle = torch.arange(side)[:, None] * rate
    line = torch.cat([angle.sin(), angle.cos()], -1)
    grid = torch.cat([line.expand(side, side, -1), line[:, None].expand(side, side, -1)], -1)
    return rearrange(grid, "y x c -> (y x) c")
