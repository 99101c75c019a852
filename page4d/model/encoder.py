"""The image encoder: a DINOv2-style vision transformer with register tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import Page4DConfig
from ..layers import Block, Conv2d, LayerNorm, Linear


class PatchProjection(nn.Module):
    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, h*w, C), row-major."""
        return rearrange(self.proj(images), "n c h w -> n (h w) c")


class Encoder(nn.Module):
    """Normalised images (N, 3, H, W) -> patch tokens (N, h*w, C)."""

    def __init__(self, config: Page4DConfig):
        super().__init__()
        dim, side = config.embed_dim, config.encoder.position_grid
        self.patch_size, self.position_grid = config.patch_size, side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.register_tokens, dim))
        self.mask_token = nn.Parameter(
            torch.zeros(1, dim), requires_grad=False
        )  # unused here: it is in the released files, from masked pre-training
        self.patch_embed = PatchProjection(config.patch_size, dim)
        heads, ratio = config.encoder.num_heads, config.mlp_ratio
        blocks = (Block(dim, heads, ratio, eps=1e-6, scale_init=1.0) for _ in range(config.encoder.depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(dim, eps=1e-6)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for token in (self.cls_token, self.register_tokens):
            nn.init.normal_(token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings of cls and patches (1, 1 + h*w, C), resampled bicubically from the learned square grid."""
        side = self.position_grid
        if grid == (side, side):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = rearrange(patches, "n (h w) c -> n c h w", h=side).float()
        resampled = F.interpolate(square, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([cls, rearrange(resampled, "n c h w -> n (h w) c").to(cls.dtype)], 1)

    def forward(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        grid = (height // self.patch_size, width // self.patch_size)
        x = torch.cat([self.cls_token.expand(count, -1, -1), self.patch_embed(images).to(self.cls_token.dtype)], 1)
        x = x + self.positions(grid)
        x = torch.cat([x[:, :1], self.register_tokens.expand(count, -1, -1), x[:, 1:]], 1)  # registers have no position embedding
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1 + self.register_tokens.shape[1] :])
