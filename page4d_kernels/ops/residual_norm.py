"""`residual_norm`: LayerScale, residual addition and the next LayerNorm."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..backends.residual_norm import BACKENDS
from ..backends.residual_norm.problem import ResidualNormProblem
from ._checks import FLOATS, expect_device, expect_floats, without_autocast
from ._operator import operator


def residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a scaled branch to the residual stream, and normalise the sum for the next branch:

        total = x + scale * branch,   normal = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias

    Mean and variance are over the last dimension. Memory traffic: x and branch are read once, total and normal are written once.
    Differentiable in all five tensors.

    Args:
        x: (..., C), the residual stream, any strides; float32, float16, bfloat16 or float64.
        branch: shape of x, any of these dtypes.
        scale, weight, bias: (C,)
        eps: added to the variance.
        dtype: dtype of normal, by default that of x.
        backend: a name; default `use_backend(..., op="residual_norm")`, then PAGE4D_RESIDUAL_NORM, then automatic.

    Returns:
        total in x's dtype and normal in `dtype`, both contiguous with the shape of x, computed in fp32 (float64 for float64).

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit. BackendError: see `mask_attention`.

    Source: LayerScale (arXiv 2103.17239) and pre-norm residual blocks, as in the VGGT / PAGE-4D aggregator.
    """
    dtype = x.dtype if dtype is None else dtype
    _check(x, branch, {"scale": scale, "weight": weight, "bias": bias}, dtype)
    inputs = (x, branch, scale, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    widest = functools.reduce(torch.promote_types, (tensor.dtype for tensor in inputs), dtype)
    problem = ResidualNormProblem(x.device.type, widest, x.numel() // x.shape[-1], x.shape[-1], needs_grad, branch.dtype)
    chosen = BACKENDS.choose(problem, backend)
    total, normal = torch.ops.page4d.residual_norm(*inputs, eps, dtype, chosen.name)
    return total, normal


def _check(x: Tensor, branch: Tensor, vectors: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in {"x": x, "branch": branch, **vectors}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        expect_floats("residual_norm", tensor)
        expect_device(name, tensor, "x", x)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, not {dtype}")
    if x.dim() < 1 or x.numel() == 0:
        raise ValueError(f"x must be (..., C) and not empty, not {tuple(x.shape)}")
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {tuple(x.shape)}, not {tuple(branch.shape)}")
    for name, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape ({x.shape[-1]},), as x has channels, not {tuple(vector.shape)}")


@operator("residual_norm")
def _op(
    x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    with without_autocast(x):
        total, normal = BACKENDS.get(backend).forward(x, branch, scale, weight, bias, eps, dtype)
    return total.contiguous(), normal.contiguous()


@_op.register_fake
def _(x, branch, scale, weight, bias, eps, dtype, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


@operator("residual_norm_backward")
def _backward_op(
    d_total: Tensor, d_normal: Tensor, total: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, scale, weight, bias."""
    backward = BACKENDS.get(backend).backward
    assert backward is not None  # every backend of this op has one
    with without_autocast(total):
        d_x, d_branch, *d_vectors = backward(d_total, d_normal, total, branch, scale, weight, eps)
    return d_x.contiguous(), d_branch.contiguous(), *d_vectors


@_backward_op.register_fake
def _(d_total, d_normal, total, branch, scale, weight, eps, backend):
    vectors = (x.new_empty(x.shape) for x in (scale, weight, weight))
    return total.new_empty(total.shape), branch.new_empty(branch.shape), *vectors


def _setup_context(ctx, inputs, output):
    _, branch, scale, weight, _, ctx.eps, _, ctx.backend = inputs
    ctx.save_for_backward(output[0], branch, scale, weight)


def _autograd(ctx, d_total, d_normal):
    total, branch, scale, weight = ctx.saved_tensors
    gradients = torch.ops.page4d.residual_norm_backward(d_total, d_normal, total, branch, scale, weight, ctx.eps, ctx.backend)
    return (*gradients, None, None, None)


_op.register_autograd(_autograd, setup_context=_setup_context)
