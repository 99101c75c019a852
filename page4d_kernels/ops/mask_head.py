"""`mask_head`: the dynamics-aware mask head, from tokens to one additive bias per key."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.mask_head import BACKENDS
from ..backends.mask_head.problem import MaskHeadProblem
from ..reference import accumulation_dtype
from ._checks import expect, expect_device, expect_floats, expect_frames, expect_tensor, without_autocast
from ._operator import operator


def mask_head(
    tokens: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    grid: tuple[int, int],
    special_tokens: int,
    backend: str | None = None,
) -> Tensor:
    """Key bias c for `mask_attention` from the tokens of one layer:

        z = (u - mean(u)) / max(std(u), 1e-6)         per frame and channel over the patches u, unbiased standard deviation
        g = conv1x1(gelu(conv1x1(gelu(depthwise3x3(z)))))                                   C -> C -> hidden -> 1, exact gelu
        c = sigmoid(g + mean over channels of z) - 1/2 at patches, 0 at special tokens

    Differentiable in the six parameters only. By definition the tokens are detached, and with them the channel mean.

    Args:
        tokens: (B, S, P, C), P = special_tokens + h*w; float32, float16, bfloat16 or float64.
        depthwise_weight (C, 1, 3, 3), depthwise_bias (C,); hidden_weight (hidden, C, 1, 1), hidden_bias (hidden,);
        out_weight (1, hidden, 1, 1), out_bias (1,): any of the dtypes above.
        grid: patches per frame (h, w); at least two patches, as the standard deviation of one is undefined.
        special_tokens: tokens before the patches of each frame.
        backend: a name; default `use_backend(..., op="mask_head")`, then PAGE4D_MASK_HEAD, then automatic.

    Returns:
        (B, S*P) float32 (float64 for float64 tokens), in (-1/2, 1/2).

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit, or the grid is 1 x 1. BackendError: see `mask_attention`.

    Source: PAGE-4D (ICLR 2026), dynamics-aware aggregator.
    """
    parameters = [depthwise_weight, depthwise_bias, hidden_weight, hidden_bias, out_weight, out_bias]
    _check(tokens, parameters, grid, special_tokens)
    batch, frames, _, channels = tokens.shape
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in parameters)
    problem = MaskHeadProblem(
        tokens.device.type, tokens.dtype, batch, frames, grid, special_tokens, channels, hidden_weight.shape[0], needs_grad
    )
    chosen = BACKENDS.choose(problem, backend)
    return torch.ops.page4d.mask_head(tokens.detach(), parameters, list(grid), special_tokens, chosen.name)


def _check(tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> None:
    expect_tensor("tokens", tokens, 4, "(B, S, P, C)")
    expect_floats("mask_head", tokens)
    if 0 in tokens.shape:
        raise ValueError(f"no dimension may be empty: tokens {tuple(tokens.shape)}")
    expect_frames(grid, special_tokens)
    patches = grid[0] * grid[1]
    expect(patches >= 2, "the mask head needs at least two patches (the standard deviation of one is undefined): use a larger image")
    per_frame = special_tokens + patches
    if tokens.shape[2] != per_frame:
        wrong = f"grid {tuple(grid)} and {special_tokens} special tokens make {per_frame} tokens per frame, not {tokens.shape[2]}"
        raise ValueError(wrong)
    names = ("depthwise_weight", "depthwise_bias", "hidden_weight", "hidden_bias", "out_weight", "out_bias")
    for name, parameter, rank in zip(names, parameters, (4, 1, 4, 1, 4, 1), strict=True):
        expect_tensor(name, parameter, rank, "")
        expect_floats("mask_head", parameter)
    channels, hidden = tokens.shape[3], parameters[2].shape[0]
    shapes = [(channels, 1, 3, 3), (channels,), (hidden, channels, 1, 1), (hidden,), (1, hidden, 1, 1), (1,)]
    for name, parameter, shape in zip(names, parameters, shapes, strict=True):
        if parameter.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(parameter.shape)}")
        expect_device(name, parameter, "tokens", tokens)


@operator("mask_head")
def _op(tokens: Tensor, parameters: Sequence[Tensor], grid: Sequence[int], special_tokens: int, backend: str) -> Tensor:
    height, width = grid
    with without_autocast(tokens):
        return BACKENDS.get(backend).forward(tokens, list(parameters), (height, width), special_tokens)


@_op.register_fake
def _(tokens, parameters, grid, special_tokens, backend):
    batch, frames, per_frame, _ = tokens.shape
    return tokens.new_empty(batch, frames * per_frame, dtype=accumulation_dtype(tokens.dtype))


@operator("mask_head_backward")
def _backward_op(
    d_bias: Tensor, tokens: Tensor, parameters: Sequence[Tensor], grid: Sequence[int], special_tokens: int, backend: str
) -> list[Tensor]:
    """Gradients of the six parameters."""
    backward = BACKENDS.get(backend).backward
    assert backward is not None  # every backend of this op has one
    height, width = grid
    with without_autocast(tokens):
        return backward(d_bias, tokens, list(parameters), (height, width), special_tokens)


@_backward_op.register_fake
def _(d_bias, tokens, parameters, grid, special_tokens, backend):
    return [torch.empty_like(parameter) for parameter in parameters]


def _setup_context(ctx, inputs, output):
    tokens, parameters, ctx.grid, ctx.special_tokens, ctx.backend = inputs
    ctx.save_for_backward(tokens, *parameters)


def _autograd(ctx, d_bias):
    tokens, *parameters = ctx.saved_tensors
    gradients = torch.ops.page4d.mask_head_backward(d_bias.contiguous(), tokens, parameters, ctx.grid, ctx.special_tokens, ctx.backend)
    return None, gradients, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
