"""Trials and timed calls of `mask_attention`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from ...layout import TokenLayout
from ...ops.mask_attention import describe
from ...testing import (
    NAMES,
    AttentionInputs,
    attention_gradients,
    attention_inputs,
    gradient_slack,
    oracle_attention,
    plain_attention,
)
from ..trial import Draw, Expected, Results, Setting, Timed, Trial, at_an_odd_address, upstream_of

PER_FRAME, SPECIAL = 893, 5


def variant(setting: Setting) -> str:
    return f"head dim {setting.head_dim}"


def trials(setting: Setting, draw: Draw) -> Iterator[Trial]:
    """Everything that hurts: ragged tails, views, special rows, a large gate, one row, many keys, long sequences."""

    def ragged(frames: int, low: int, high: int, **options) -> AttentionInputs:
        layout = TokenLayout(frames, draw.size(low, high), SPECIAL)
        draw.lengths.append(layout.tokens)
        return attention_inputs(layout, head_dim=setting.head_dim, dtype=setting.dtype, device=setting.device, seed=draw.seed(), **options)

    def trial(name: str, x: AttentionInputs) -> Trial:
        return _trial(name, x, setting.training)

    yield trial("views of one projection", ragged(3, 59, 59, packed=True))
    yield trial("two batches", ragged(3, 17, 300, batch=2, heads=5, packed=True))
    yield trial("without a layout", dataclasses.replace(ragged(2, 17, 300), layout=None))
    yield trial("without a mask", _without_mask(ragged(1, 300, 900, batch=3)))
    yield trial("some rows", _rows(ragged(1, 900, 2100), draw.size(9, 40)))
    yield trial("one row", _rows(ragged(1, 20, 300), 1))
    yield trial("one key", _one_key(ragged(1, 20, 200)))
    yield trial("large logits and a large gate", ragged(2, 100, 300, spread=4.0, strength=128.0))
    yield trial("at an odd address", _at_odd_addresses(ragged(2, 20, 300)))
    yield trial("many tiles", ragged(3, 300, 450, packed=True))
    if setting.device == "cuda" and not setting.training:
        yield _long_trial(ragged(20, PER_FRAME, PER_FRAME + 60, heads=1, packed=True), draw)


def _rows(x: AttentionInputs, rows: int) -> AttentionInputs:
    """The first rows against all keys, all of them gated, as the special rows of a sequence."""
    assert x.query_gate is not None
    return dataclasses.replace(x, q=x.q[:, :, :rows], query_gate=torch.full_like(x.query_gate[:, :rows], 8.0), layout=None)


def _without_mask(x: AttentionInputs) -> AttentionInputs:
    return dataclasses.replace(x, query_gate=None, key_bias=None, layout=None)


def _one_key(x: AttentionInputs) -> AttentionInputs:
    assert x.key_bias is not None
    return dataclasses.replace(x, k=x.k[:, :, :1], v=x.v[:, :, :1], key_bias=x.key_bias[:, :1], layout=None)


def _at_odd_addresses(x: AttentionInputs) -> AttentionInputs:
    odd: dict[str, Any] = {name: at_an_odd_address(getattr(x, name)) for name in NAMES}
    return dataclasses.replace(x, **odd)


def _problem(x: AttentionInputs, training: bool):
    problem = describe(x.q, x.k, x.v, x.query_gate, x.key_bias, layout=x.layout)
    names = [name for name, tensor in zip(NAMES, x.tensors(), strict=True) if tensor is not None]
    return dataclasses.replace(problem, needs_grad=frozenset(names if training else ()))


def _trial(name: str, x: AttentionInputs, training: bool) -> Trial:
    scale = x.q.shape[-1] ** -0.5

    def run(backend: str) -> Results:
        if not training:
            with torch.no_grad():
                return {"out": x.attend(backend)}
        mine = x.to(x.q.dtype).requires_grad_()
        out = mine.attend(backend)
        return {"out": out.detach()} | _gradients(out, mine)

    def expected() -> Expected:
        if not training:
            with torch.no_grad():
                return Expected({"out": oracle_attention(x, scale)[0]}, {"out": plain_attention(x, scale)})
        exact, low = x.to(torch.float64).requires_grad_(), x.to(x.q.dtype).requires_grad_()
        out, lse = oracle_attention(exact, scale)
        plain = plain_attention(low, scale)
        slack = gradient_slack(exact, out.detach(), lse.detach(), upstream_of(x.q), scale)
        return Expected(
            {"out": out.detach()} | _gradients(out, exact),
            {"out": plain.detach()} | _gradients(plain, low),
            {f"gradient of {name}": size for name, size in slack.items()},
        )

    return Trial(f"{name} ({x.q.shape[2]} x {x.k.shape[2]} tokens)", _problem(x, training), run, expected, _given(x))


def _given(x: AttentionInputs) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for tensor in x.tensors() if tensor is not None)


def _gradients(out: torch.Tensor, x: AttentionInputs) -> Results:
    found = attention_gradients(out, x, upstream_of(out))
    if x.layout is not None and "query_gate" in found:  # by the layout the rest of the gate is constant
        found["query_gate"] = x.layout.only_special(found["query_gate"])
    return {f"gradient of {name}": gradient for name, gradient in found.items()}


def _long_trial(x: AttentionInputs, draw: Draw) -> Trial:
    """Many tokens, compared on rows drawn at random, as the float64 logits of all rows would not fit."""
    last = x.q.shape[2] - 1
    rows = torch.tensor(sorted({0, last, *(draw.size(0, last) for _ in range(64))}), device=x.q.device)
    assert x.query_gate is not None
    some = dataclasses.replace(x, q=x.q[:, :, rows], query_gate=x.query_gate[:, rows], layout=None)

    def run(backend: str) -> Results:
        with torch.no_grad():
            return {"out": x.attend(backend)[:, :, rows]}

    return Trial(f"a long sequence ({last + 1} tokens)", _problem(x, False), run, _trial("", some, False).expected, _given(x))


def timed(setting: Setting) -> Iterator[Timed]:
    """One call per class, the most important first. On a CPU with few heads, as the time per head does not depend on their number."""
    dtype, device, training, head_dim = setting.dtype, setting.device, setting.training, setting.head_dim
    heads = 16 if device == "cuda" else min(16, torch.get_num_threads())
    over = 20 if device == "cuda" else 10  # frames, for more than 8192 tokens

    def inputs(frames: int, batch: int = 1, per_frame: int = PER_FRAME) -> AttentionInputs:
        layout = TokenLayout(frames, per_frame, SPECIAL)
        q, k, v = torch.randn(batch, layout.tokens, 3, heads, head_dim, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
        vectors = torch.rand(2, batch, layout.tokens, dtype=torch.float32, device=device)
        return AttentionInputs(q, k, v, layout.only_special(vectors[0]), vectors[1], layout)

    def rows(x: AttentionInputs) -> AttentionInputs:
        """The gated rows of a sequence against all its keys."""
        assert x.layout is not None and x.query_gate is not None
        return dataclasses.replace(x, q=x.layout.special(x.q, 2), query_gate=x.layout.special(x.query_gate, 1), layout=None)

    def every_row(x: AttentionInputs) -> AttentionInputs:
        """A bias in all rows, as in the layers with cells of an attention plan."""
        assert x.query_gate is not None
        return dataclasses.replace(x, query_gate=torch.ones_like(x.query_gate), layout=None)

    yield _timed(inputs(4), training)
    yield _timed(_without_mask(inputs(1, batch=4)), training)
    yield _timed(inputs(2), training)
    yield _timed(_without_mask(inputs(1, batch=8, per_frame=260)), training)
    yield _timed(inputs(over), training)
    yield _timed(rows(inputs(4)), training)
    yield _timed(_without_mask(inputs(4)), training)
    yield _timed(every_row(inputs(4)), training)
    yield _timed(rows(inputs(over)), training)
    yield _timed(every_row(inputs(over)), training)
    yield _timed(_without_mask(inputs(over)), training)


def _timed(x: AttentionInputs, training: bool) -> Timed:
    d_out = torch.randn_like(x.q)
    leaves = x.to(x.q.dtype).requires_grad_() if training else x

    def run(backend: str) -> object:
        with torch.set_grad_enabled(training):
            out = leaves.attend(backend)
            return attention_gradients(out, leaves, d_out) if training else out

    return Timed(_problem(x, training), run)
