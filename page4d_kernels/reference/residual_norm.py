"""LayerScale, residual addition and the LayerNorm of the next branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import accumulation_dtype


def residual_norm(
    x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum in x's dtype and the normalised sum in `dtype`, both (..., C)."""
    acc = accumulation_dtype(x.dtype)
    total = torch.addcmul(x.to(acc), branch.to(acc), scale.to(acc)).to(x.dtype)
    return total, F.layer_norm(total.to(acc), weight.shape, weight.to(acc), bias.to(acc), eps).to(dtype)


def residual_norm_backward(
    d_total: Tensor, d_normal: Tensor, total: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, scale, weight, bias.

    The gradient of LayerNorm is rstd (g - mean(g) - n mean(g n)), with n the normalised sum before the affine part and g = d_normal weight.
    """
    acc = accumulation_dtype(total.dtype)
    wide = total.to(acc)
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, d_normal = centred * rstd, d_normal.to(acc)
    g = d_normal * weight.to(acc)
    d_x = d_total.to(acc) + rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    rows = tuple(range(total.dim() - 1))
    d_vectors = ((d_x * branch.to(acc)).sum(rows), (d_normal * n).sum(rows), d_normal.sum(rows))
    d_scale, d_weight, d_bias = (d.to(x.dtype) for d, x in zip(d_vectors, (scale, weight, weight), strict=True))
    return d_x.to(total.dtype), (d_x * scale.to(acc)).to(branch.dtype), d_scale, d_weight, d_bias
