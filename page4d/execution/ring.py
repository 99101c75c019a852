"""Attention whose keys go round a ring of ranks: partial results of blocks of keys, merged by their log-sum-exp.

Rows keep their place. Every rank passes its block of keys on, and each block is used by one call per kind of rows, while the next block is
already on its way. With out_j and l_j the result and the log-sum-exp of block j: l = log sum_j exp(l_j), out = sum_j exp(l_j - l) out_j.
The backward passes the blocks round once more, with their gradients behind them; each block needs only the merged l and out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from page4d_kernels.backends.mask_attention import BACKENDS
from page4d_kernels.backends.mask_attention.problem import AttentionProblem
from page4d_kernels.backends.registry import AUTO
from page4d_kernels.ops.mask_attention import describe
from page4d_kernels.reference import accumulation_dtype

from ..config import Page4DConfig
from ..errors import InputError
from .across import Across
from .ranks import Pending

ROWS = 4096  # merged at a time


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of q that see the same keys in the same way."""

    index: Tensor | None  # (n,) of this row of the mesh; None: all
    biased: bool = False  # with query gate and key bias
    kept: Sequence[Tensor] | None = None  # of each block, the keys that they see; None: all
    log_counts: Sequence[Tensor] | None = None  # of these, added to the logits

    def of(self, x: Tensor, dim: int) -> Tensor:
        return x if self.index is None else x.index_select(dim, self.index)


def ring_attention(
    across: Across,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    rows: Sequence[Rows],
    per_frame: int,
    backend: str | None,
) -> list[Tensor]:
    """The outputs (B, h, n, D) of each kind of rows, in q's dtype. Differentiable in q, k, v, gate and bias.

    Args:
        q, k, v: (B, h, N, D) of the frames of this row of the mesh.
        gate: (B, N) of these; bias: (B, tokens of all frames).
        per_frame: tokens of a frame.
    """
    return list(_Ring.apply(q, k, v, gate, bias, _Circle(across, per_frame), tuple(rows), backend))


@dataclass(frozen=True)
class _Circle:
    """The ring that this rank is in. Block j has the tokens of row j of the mesh."""

    across: Across
    per_frame: int

    @property
    def length(self) -> int:
        return self.across.mesh.rings

    @property
    def place(self) -> int:
        return self.across.ranks.rank // self.across.mesh.heads

    def block(self, step: int) -> int:
        """Which block this rank has at a step."""
        return (self.place - step) % self.length

    def tokens(self, block: int) -> slice:
        frames = self.across.rows_of_frames()[block]
        return slice(frames.start * self.per_frame, frames.stop * self.per_frame)

    def pass_on(self, x: Tensor, step: int) -> Pending:
        """Send x (block of `step`, ...) to the next rank; wait for that of `step` + 1 from the one before."""
        ranks, heads = self.across.ranks, self.across.mesh.heads
        there, before = ((ranks.rank + side * heads) % ranks.size for side in (1, -1))
        tokens = self.tokens(self.block(step + 1))
        receive = x.new_empty(tokens.stop - tokens.start, *x.shape[1:])
        sizes, expected = [0] * ranks.size, [0] * ranks.size
        sizes[there], expected[before] = len(x), len(receive)
        return ranks.start("ring", x, sizes, receive, expected)


def _forward(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, scale: float, name: str) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.page4d.mask_attention(q, k, v, gate, bias, None, scale, name)
    return out, lse


def by_head(x: Tensor) -> Tensor:
    """(N, B, h, D) -> (B, h, N, D)."""
    return x.permute(1, 2, 0, 3)


def by_token(x: Tensor) -> Tensor:
    """(B, h, N, D) -> (N, B, h, D), contiguous."""
    return x.permute(2, 0, 1, 3).contiguous()


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gate, bias, circle, rows, backend):
        ctx.circle, ctx.rows, ctx.scale = circle, rows, q.shape[-1] ** -0.5
        ctx.names, ctx.gradients = [""] * len(rows), any(ctx.needs_input_grad)
        dtype = accumulation_dtype(q.dtype)
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        parts = [each.of(q, 2) for each in rows]

        def use(block: int, keys: Tensor, values: Tensor) -> None:
            for i, each in enumerate(rows):
                kv, vectors = _seen(each, block, circle, by_head(keys), by_head(values), gate, bias)
                ctx.names[i] = ctx.names[i] or _choose(parts[i], *kv, *vectors, backend, ctx.gradients)
                out, lse = _forward(parts[i], *kv, *vectors, ctx.scale, ctx.names[i])
                if i == len(outs):
                    outs.append(out.to(dtype))
                    lses.append(lse)
                else:
                    _merge(outs[i], lses[i], out, lse)

        _go_round(circle, [by_token(k), by_token(v)], use)
        merged = [out.to(q.dtype) for out in outs]
        ctx.save_for_backward(q, k, v, gate, bias, *merged, *lses)
        return tuple(merged)

    @staticmethod
    def backward(ctx, *d_outs):
        q, k, v, gate, bias, *saved = ctx.saved_tensors
        circle, rows, count = ctx.circle, ctx.rows, len(ctx.rows)
        outs, lses = saved[:count], saved[count:]
        dtype = accumulation_dtype(q.dtype)
        d_q = torch.zeros(q.shape, dtype=dtype, device=q.device)
        d_gate, d_bias = (None if x is None else torch.zeros_like(x) for x in (gate, bias))
        parts = [each.of(q, 2) for each in rows]
        coming: list[Pending] = []  # gradients of the block's keys and values, from the ranks that had it before

        def use(block: int, keys: Tensor, values: Tensor) -> None:
            found = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (keys, values)]
            for i, each in enumerate(rows):
                kv, vectors = _seen(each, block, circle, by_head(keys), by_head(values), gate, bias)
                d_rows, d_k, d_v, d_r, d_c = torch.ops.page4d.mask_attention_backward(
                    parts[i], *kv, *vectors, outs[i], lses[i], d_outs[i].contiguous(), None, None, ctx.scale, ctx.names[i]
                )
                _add(d_q, 2, each.index, d_rows)
                kept = None if each.kept is None else each.kept[block]
                for whole, part in zip(found, (d_k, d_v), strict=True):
                    _add(by_head(whole), 2, kept, part)
                if each.biased and d_gate is not None and d_bias is not None:
                    _add(d_gate, 1, each.index, d_r)
                    d_bias[:, circle.tokens(block)] += d_c
            step = (circle.place - block) % circle.length
            if coming:  # what the ranks before have found for this block
                for whole, pending in zip(found, coming, strict=True):
                    whole += pending.wait()
            coming[:] = [circle.pass_on(x, step) for x in found]

        _go_round(circle, [by_token(k), by_token(v)], use)
        d_k, d_v = (by_head(pending.wait()).to(k.dtype) for pending in coming)  # the last step sends each block home
        return d_q.to(q.dtype), d_k, d_v, d_gate, d_bias, None, None, None


def _go_round(circle: _Circle, block: list[Tensor], use: Callable[..., None]) -> None:
    """Use each block once. The next one is on its way meanwhile."""
    for step in range(circle.length):
        coming = [circle.pass_on(x, step) for x in block] if step + 1 < circle.length else []
        use(circle.block(step), *block)
        block = [pending.wait() for pending in coming]


def _seen(
    rows: Rows, block: int, circle: _Circle, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """The keys and values of a block that rows see, and the vectors of the bias."""
    if rows.kept is not None and rows.log_counts is not None:
        weights = rows.log_counts[block].to(accumulation_dtype(k.dtype)).expand(k.shape[0], -1)
        count = _count(rows, circle)
        ones = torch.ones(k.shape[0], count, dtype=weights.dtype, device=k.device)
        return (k.index_select(2, rows.kept[block]), v.index_select(2, rows.kept[block])), (ones, weights)
    if rows.biased and gate is not None and bias is not None:
        return (k, v), (rows.of(gate, 1), bias[:, circle.tokens(block)])
    return (k, v), (None, None)


def _count(rows: Rows, circle: _Circle) -> int:
    """How many rows there are."""
    own = circle.tokens(circle.place)
    return own.stop - own.start if rows.index is None else len(rows.index)


def check_backend(across: Across, batch: int, tokens: int, config: Page4DConfig, dtype: torch.dtype) -> None:
    """InputError if keys go round and the attention backend that was asked for cannot serve that."""
    mesh, name = across.mesh, BACKENDS.requested()
    if mesh.rings == 1 or name == AUTO:
        return
    heads, head_dim = config.num_heads // mesh.heads, config.embed_dim // config.num_heads
    problem = AttentionProblem(across.ranks.device.type, dtype, batch, heads, tokens, tokens, head_dim, need_lse=True)
    reasons = BACKENDS.reasons(name, problem)
    if reasons:
        could = ", ".join(BACKENDS.usable(problem))
        raise InputError(
            f"{across.ranks.size} ranks are {mesh}, and backend {name!r} cannot serve rings ({'; '.join(reasons)}): use auto, or one of "
            f"{could}, or a number of ranks that divides the {config.num_heads} heads"
        )


def _choose(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, backend: str | None, gradients: bool) -> str:
    """The backend for these rows, which must return the log-sum-exp, and have a backward if one is wanted."""
    problem = describe(q, k, v, gate, bias, return_lse=True)
    return BACKENDS.choose(replace(problem, needs_grad=frozenset("qkv") if gradients else frozenset()), backend).name


def _merge(out: Tensor, lse: Tensor, more: Tensor, its_lse: Tensor) -> None:
    """Add the result over more keys, in place. A row that saw nothing in either has log-sum-exp -inf and stays 0."""
    both = torch.logaddexp(lse, its_lse)
    shift = both.masked_fill(both == -torch.inf, 0)
    weights = ((x - shift).exp().unsqueeze(-1) for x in (lse, its_lse))
    for whole, part, before, now in zip(*(x.split(ROWS, 2) for x in (out, more, *weights)), strict=True):  # copies of some rows only
        whole.mul_(before).add_(part.to(whole.dtype).mul_(now))
    lse.copy_(both)


def _add(whole: Tensor, dim: int, index: Tensor | None, part: Tensor) -> None:
    """Add `part` to `whole`, or to these places of it."""
    if index is None:
        whole += part
    else:
        whole.index_add_(dim, index, part.to(whole.dtype))
