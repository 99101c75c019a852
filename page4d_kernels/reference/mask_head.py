"""The dynamics-aware mask head: from the tokens of a layer to one additive bias per key."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.grad import conv2d_weight

from . import accumulation_dtype

MIN_STD = 1e-6


def _normalise(tokens: Tensor, grid: tuple[int, int], special_tokens: int) -> Tensor:
    """Patch tokens (B*S, C, h, w), normalised per frame and channel to zero mean and unit (unbiased) standard deviation over space."""
    u = rearrange(tokens[:, :, special_tokens:], "b s (h w) c -> (b s) c h w", h=grid[0]).to(accumulation_dtype(tokens.dtype))
    return (u - u.mean((2, 3), keepdim=True)) / u.std((2, 3), keepdim=True, unbiased=True).clamp_min(MIN_STD)


def _head(z: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The two pre-activations and the output of conv1x1(gelu(conv1x1(gelu(depthwise3x3(z)))))."""
    w0, b0, w2, b2, w4, b4 = (parameter.to(z.dtype) for parameter in parameters)
    a0 = F.conv2d(z, w0, b0, padding=1, groups=z.shape[1])
    a2 = F.conv2d(F.gelu(a0), w2, b2)
    return a0, a2, F.conv2d(F.gelu(a2), w4, b4)


def mask_head(tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> Tensor:
    """Key bias (B, S*P): 0 at special tokens, sigmoid(head(z) + mean over channels of z) - 1/2 at patches."""
    batch, frames, per_frame, _ = tokens.shape
    z = _normalise(tokens, grid, special_tokens)
    s = torch.sigmoid(_head(z, parameters)[2] + z.mean(1, keepdim=True)) - 0.5
    bias = s.new_zeros(batch, frames, per_frame)
    bias[:, :, special_tokens:] = rearrange(s, "(b s) 1 h w -> b s (h w)", b=batch)
    return rearrange(bias, "b s p -> b (s p)")


def _gelu_slope(x: Tensor) -> Tensor:
    """d gelu / dx = Phi(x) + x phi(x)."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def mask_head_backward(
    d_bias: Tensor, tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int
) -> list[Tensor]:
    """Gradients of the six parameters. By definition the tokens are detached, and with them the channel mean."""
    z = _normalise(tokens, grid, special_tokens)
    a0, a2, g = _head(z, parameters)
    probability = torch.sigmoid(g + z.mean(1, keepdim=True))
    d_patches = rearrange(d_bias, "b (s p) -> b s p", p=tokens.shape[2])[:, :, special_tokens:]
    d_s = rearrange(d_patches, "b s (h w) -> (b s) 1 h w", h=grid[0]).to(z.dtype)
    d_g = d_s * probability * (1 - probability)
    _, _, w2, _, w4, _ = (parameter.to(z.dtype) for parameter in parameters)
    h0, h2 = F.gelu(a0), F.gelu(a2)
    d_a2 = d_g * w4.view(1, -1, 1, 1) * _gelu_slope(a2)
    d_a0 = torch.einsum("nohw,oc->nchw", d_a2, w2.flatten(1)) * _gelu_slope(a0)
    gradients = [
        conv2d_weight(z, parameters[0].shape, d_a0, padding=1, groups=z.shape[1]),
        d_a0.sum((0, 2, 3)),
        torch.einsum("nohw,nchw->oc", d_a2, h0),
        d_a2.sum((0, 2, 3)),
        torch.einsum("nohw,nchw->oc", d_g, h2),
        d_g.sum((0, 2, 3)),
    ]
    return [gradient.reshape(parameter.shape).to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True)]
