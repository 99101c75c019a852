"""The dynamics-aware mask head."""

from __future__ import annotations

from torch import Tensor, nn

from page4d_kernels import mask_head


class MaskHead(nn.Module):
    """Tokens (B, S, P, C) -> key bias (B, S*P) in (-1/2, 1/2), 0 at special tokens."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.head0 = nn.Sequential(depthwise, nn.GELU(), nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, 1, 1))

    def forward(self, tokens: Tensor, grid: tuple[int, int], special_tokens: int) -> Tensor:
        depthwise, _, hidden, _, out = self.head0
        parameters = [x for layer in (depthwise, hidden, out) for x in (layer.get_parameter("weight"), layer.get_parameter("bias"))]
        return mask_head(tokens, *parameters, grid=grid, special_tokens=special_tokens)
