from __future__ import annotations

import torch
from torch import Tensor, nn

from page4d_kernels import residual_norm

from .attention import Attend, Attention, Modulation, Rope, Sparsity
from .linear import LayerNorm
from .mlp import Mlp


class LayerScale(nn.Module):
    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: x += ls1 attn(norm1 x), x += ls2 mlp(norm2 x)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        *,
        qk_norm: bool = False,
        eps: float = 1e-5,
        scale_init: float = 0.01,
        backend: str | None = None,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qk_norm, backend)
        self.ls1 = LayerScale(dim, scale_init)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.ls2 = LayerScale(dim, scale_init)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        modulation: Modulation | None = None,
        sparsity: Sparsity | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        return self.finish(x, self.attn(self.norm1(x), rope, modulation, sparsity, attend))

    def finish(self, x: Tensor, branch: Tensor) -> Tensor:
        """The rest of the block after attention. Tokens x and the attention output `branch` are (B, N, C)."""
        norm = self.norm2
        x, normal = residual_norm(x, branch, self.ls1.gamma, norm.weight, norm.bias, eps=norm.eps, dtype=self.mlp.fc1.weight.dtype)
        return x + self.ls2(self.mlp(normal))
