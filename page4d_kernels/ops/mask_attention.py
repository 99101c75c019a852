"""`mask_attention`: attention with a separable additive bias, softmax(q k^T * scale + r c^T) v."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import env
from ..backends.mask_attention import BACKENDS
from ..backends.mask_attention.problem import AttentionArgs, AttentionProblem
from ..backends.registry import BackendError
from ..layout import TokenLayout, to_token_major
from ..reference import accumulation_dtype
from . import _checks
from ._checks import dtype_name, expect, expect_device, expect_finite, expect_floats, expect_like, expect_tensor, without_autocast
from ._operator import operator

NO_GRADIENT: frozenset[str] = frozenset()


def mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention with the additive bias r_i c_j, the same for every head:

        out = softmax(q k^T * scale + r c^T) v,   r = query_gate, c = key_bias

    This is PAGE-4D's mask-modulated attention: r is the mask strength at the special tokens and 0 elsewhere, c the
    prediction of the mask head for each token. Differentiable in q, k, v, r and c if the backend supports it.

    Args:
        q: (B, H, Nq, D), float32, float16, bfloat16 or float64, any strides with unit stride in D.
        k, v: (B, H, Nk, D), dtype and device of q.
        query_gate: r, (B, Nq), float32 (float64 with float64 q). Must be given together with key_bias or not at all.
        key_bias: c, (B, Nk), float32 (float64 with float64 q).
        layout: promise that r is zero outside the special tokens of each frame. Backends then skip the bias for all other rows.
        scale: factor of q k^T, positive; 1/sqrt(D) by default.
        backend: a name from `python -m page4d_kernels.info`; default `use_backend`, then PAGE4D_ATTN, then automatic.
        return_lse: also return log(sum_j exp(logit_ij)), (B, H, Nq) float32 (float64 with float64 q), to merge partial results.

    Returns:
        (B, H, Nq, D) in q's dtype; a row whose logits are all -inf gives 0. With `return_lse` a pair.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or strides do not fit; r or c is not finite (checked on the CPU, and elsewhere
            only with PAGE4D_DEBUG=1, as the check synchronises the device).
        BackendError: the chosen backend cannot serve the call, or no backend can. The message lists the reasons and the backends that
            could.

    Source: PAGE-4D (ICLR 2026), dynamics-aware aggregator.
    """
    _check(q, k, v, query_gate, key_bias, layout, scale)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if layout is not None and layout.special_tokens == 0:
        query_gate = key_bias = None  # the layout promises that nothing is gated
    if layout is not None and query_gate is not None and query_gate.requires_grad:
        query_gate = layout.only_special(query_gate)  # the rest is constant by the promise: no gradient there with any backend
    problem = describe(q, k, v, query_gate, key_bias, layout=layout, return_lse=return_lse)
    chosen = BACKENDS.choose(problem, backend)
    if chosen.backward is None:
        if not torch.compiler.is_compiling() and any(x.storage_offset() * x.element_size() % 16 for x in (q, k, v)):
            q, k, v = q.clone(), k.clone(), v.clone()  # as in `_op`; with torch.func, tensors have no address
        with without_autocast(q):  # such a backend refuses `return_lse`
            out = chosen.forward(AttentionArgs(q, k, v, query_gate, key_bias, layout, scale))
        if not isinstance(out, Tensor) or out.shape != q.shape or out.dtype != q.dtype or out.device != q.device:
            found = f"{tuple(out.shape)} {dtype_name(out.dtype)} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
            wanted = f"{tuple(q.shape)} {dtype_name(q.dtype)} on {q.device}"
            raise BackendError(f"mask_attention: backend {chosen.name!r} returned {found} instead of {wanted}")
        return out
    packed = None if layout is None else [layout.frames, layout.tokens_per_frame, layout.special_tokens]
    out, lse = torch.ops.page4d.mask_attention(q, k, v, query_gate, key_bias, packed, scale, chosen.name)
    return (out, lse) if return_lse else out


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    layout: TokenLayout | None = None,
    return_lse: bool = False,
) -> AttentionProblem:
    """The problem to pass to `BACKENDS.reasons` and `is_backend_supported`."""
    needs = NO_GRADIENT
    if torch.is_grad_enabled():
        tensors = {"q": q, "k": k, "v": v, "query_gate": query_gate, "key_bias": key_bias}
        needs = frozenset([name for name, x in tensors.items() if x is not None and x.requires_grad])
    batch, heads, queries, head_dim = q.shape
    biased = query_gate is not None
    aligned = _aligned(q) and _aligned(k) and _aligned(v)
    return AttentionProblem(q.device.type, q.dtype, batch, heads, queries, k.shape[2], head_dim, biased, layout, needs, return_lse, aligned)


def _aligned(x: Tensor) -> bool:
    """Checks the strides only: the address of a tensor is unknown during tracing."""
    batch, heads, rows, _ = x.shape
    s_batch, s_head, s_row, _ = x.stride()
    unit = 16 // x.element_size()
    return (batch == 1 or s_batch % unit == 0) and (heads == 1 or s_head % unit == 0) and (rows == 1 or s_row % unit == 0)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    layout: TokenLayout | None,
    scale: float | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect_tensor(name, x, 4, "(B, H, N, D)")
        expect_like(name, x, "q", q)
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, not {x.stride(-1)}")
    expect_floats("mask_attention", q)
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, not {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape != (batch, heads, keys, head_dim):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch, heads and head dim")
    if 0 in (batch, heads, queries, head_dim, keys):
        raise ValueError(f"no dimension may be empty: q {tuple(q.shape)}, k {tuple(k.shape)}")
    expect((query_gate is None) == (key_bias is None), "query_gate and key_bias must be given together or not at all")
    if query_gate is not None and key_bias is not None:
        wanted = accumulation_dtype(q.dtype)
        for name, x, other, tokens in (("query_gate", query_gate, "q", queries), ("key_bias", key_bias, "k", keys)):
            expect_tensor(name, x, 2, "(B, N)")
            if x.shape != (batch, tokens):
                raise ValueError(f"{name} must have shape {(batch, tokens)} to fit {other}, not {tuple(x.shape)}")
            expect_device(name, x, "q", q)
            if x.dtype != wanted:
                raise TypeError(f"{name} must be {dtype_name(wanted)} with {dtype_name(q.dtype)} q, not {dtype_name(x.dtype)}")
        if _checks.values_can_be_read(q):
            expect_finite("query_gate", query_gate)
            expect_finite("key_bias", key_bias)
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < float("inf")):
        raise ValueError(f"scale must be a positive number, not {scale!r}")
    if layout is not None:
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"layout must be a TokenLayout, not {type(layout).__name__}")
        if not layout.tokens == queries == keys:
            raise ValueError(f"{layout} has {layout.tokens} tokens, but there are {queries} queries and {keys} keys")
        if query_gate is not None and env.flag("PAGE4D_DEBUG") and _checks.values_can_be_read(query_gate):
            rest = query_gate.unflatten(1, (layout.frames, layout.tokens_per_frame))[:, :, layout.special_tokens :]
            expect(not bool(rest.any()), f"query_gate is not zero outside the special tokens, as {layout} promises")


def _for_vector_loads(x: Tensor) -> Tensor:
    """`x`, or a copy if its address is no multiple of 16 bytes: kernels load as much at once, and not all of them check."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


_layout = functools.lru_cache(TokenLayout)


def _unpack(layout: Sequence[int] | None) -> TokenLayout | None:
    return None if layout is None else _layout(*layout)


@operator("mask_attention")
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    layout: Sequence[int] | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    q, k, v = _for_vector_loads(q), _for_vector_loads(k), _for_vector_loads(v)
    with without_autocast(q):
        out, lse = BACKENDS.get(backend).forward(AttentionArgs(q, k, v, query_gate, key_bias, _unpack(layout), scale))
    return to_token_major(out), lse


@_op.register_fake
def _(q, k, v, query_gate, key_bias, layout, scale, backend):
    batch, heads, queries, head_dim = q.shape
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=accumulation_dtype(q.dtype))


@operator("mask_attention_backward")
def _backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    layout: Sequence[int] | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, query_gate, key_bias. The last two are empty if there is no bias."""
    backward = BACKENDS.get(backend).backward
    assert backward is not None  # this operator is used only for backends that have one
    q, k, v, d_out = _for_vector_loads(q), _for_vector_loads(k), _for_vector_loads(v), _for_vector_loads(d_out)
    with without_autocast(q):
        args = AttentionArgs(q, k, v, query_gate, key_bias, _unpack(layout), scale)
        d_q, d_k, d_v, d_gate, d_bias = backward(args, out, lse, d_out, d_lse)
    vectors = [lse.new_empty(0) if x is None else x for x in (d_gate, d_bias)]
    return to_token_major(d_q), to_token_major(d_k), to_token_major(d_v), vectors[0], vectors[1]


@_backward_op.register_fake
def _(q, k, v, query_gate, key_bias, out, lse, d_out, d_lse, layout, scale, backend):
    def like(x: Tensor) -> Tensor:
        batch, heads, tokens, head_dim = x.shape
        return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)

    vectors = [lse.new_empty(0) if x is None else torch.empty_like(x) for x in (query_gate, key_bias)]
    return like(q), like(k), like(v), *vectors


def _setup_context(ctx, inputs, output):
    q, k, v, query_gate, key_bias, layout, scale, backend = inputs
    ctx.save_for_backward(q, k, v, query_gate, key_bias, *output)
    ctx.layout, ctx.scale, ctx.backend = layout, scale, backend
    ctx.set_materialize_grads(False)


def _autograd(ctx, d_out, d_lse):
    q, k, v, query_gate, key_bias, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    d_q, d_k, d_v, d_gate, d_bias = torch.ops.page4d.mask_attention_backward(
        q, k, v, query_gate, key_bias, out, lse, d_out, d_lse, ctx.layout, ctx.scale, ctx.backend
    )
    if query_gate is None:
        d_gate = d_bias = None
    return d_q, d_k, d_v, d_gate, d_bias, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
