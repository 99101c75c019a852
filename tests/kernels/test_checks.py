"""Every misuse of an op gives one clear line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from page4d_kernels import TokenLayout, mask_attention, mask_head, qk_norm_rope, rope_tables
from page4d_kernels.testing import attention_inputs

LAYOUT = TokenLayout(2, 6, 2)


def arguments(**changes):
    inputs = attention_inputs(LAYOUT, head_dim=16)
    return {**{name: getattr(inputs, name) for name in ("q", "k", "v", "query_gate", "key_bias")}, **changes}


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def refuse(**changes) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        mask_attention(**arguments(**changes))
    return one_line(error)


shapes = st.lists(st.integers(0, 5), min_size=0, max_size=6).map(tuple)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["q", "k", "v", "query_gate", "key_bias"]), shape=shapes)
def test_wrong_shapes(name, shape):
    assert tuple(arguments()[name].shape) != shape
    message = refuse(**{name: torch.zeros(shape)})
    assert name in message or "q (" in message or "k and v" in message, message


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["q", "k", "v", "query_gate", "key_bias"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
)
def test_mixed_dtypes(name, dtype):
    message = refuse(**{name: arguments()[name].to(dtype)})
    assert str(dtype).removeprefix("torch.") in message


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["query_gate", "key_bias"]),
    length=st.integers(0, 30).filter(lambda n: n != LAYOUT.tokens),
)
def test_bias_of_wrong_length(name, length):
    assert f"(1, {LAYOUT.tokens})" in refuse(**{name: torch.zeros(1, length)})


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["query_gate", "key_bias"]),
    where=st.integers(0, LAYOUT.tokens - 1),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_non_finite_bias(name, where, value):
    vector = arguments()[name].clone()
    vector[0, where] = value
    assert f"{name} has 1 values that are not finite" in refuse(**{name: vector})


def test_one_bias_vector_without_the_other():
    assert "together" in refuse(key_bias=None)
    assert "together" in refuse(query_gate=None)


def test_last_dimension_has_to_be_dense():
    assert "unit stride" in refuse(k=torch.randn(1, 2, 16, 12).transpose(-1, -2))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "x"])
def test_scale_is_a_positive_number(scale):
    assert "scale must be a positive number" in refuse(scale=scale)


def test_layout_is_a_token_layout():
    assert "TokenLayout" in refuse(layout=(2, 6, 2))


def test_not_a_tensor():
    assert "must be a tensor" in refuse(q=[[1.0]])


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 5), per_frame=st.integers(1, 9))
def test_layout_of_another_length(frames, per_frame):
    layout = TokenLayout(frames, per_frame, 1)
    if layout.tokens != LAYOUT.tokens:
        assert str(layout.tokens) in refuse(layout=layout)


@settings(max_examples=30, deadline=None)
@given(st.integers(-3, 8), st.integers(-3, 8), st.integers(-3, 12))
def test_impossible_layouts(frames, per_frame, special):
    if frames >= 1 and per_frame >= 1 and 0 <= special <= per_frame:
        assert TokenLayout(frames, per_frame, special).tokens == frames * per_frame
    else:
        with pytest.raises(ValueError) as error:
            TokenLayout(frames, per_frame, special)
        one_line(error)


def test_debug_mode_checks_the_promise(monkeypatch):
    broken = arguments(layout=LAYOUT)
    broken["query_gate"] = torch.ones(1, LAYOUT.tokens)
    mask_attention(**broken)
    monkeypatch.setenv("PAGE4D_DEBUG", "1")
    assert "not zero outside the special tokens" in refuse(**broken)


def test_unknown_arguments_are_errors():
    with pytest.raises(TypeError):
        mask_attention(**arguments(), attn_mask=None)


def test_mask_head_refuses_a_single_patch():
    tokens = torch.randn(1, 2, 6, 8)
    parameters = [torch.zeros(shape) for shape in [(8, 1, 3, 3), (8,), (4, 8, 1, 1), (4,), (1, 4, 1, 1), (1,)]]
    with pytest.raises(ValueError, match="at least two patches") as error:
        mask_head(tokens, *parameters, grid=(1, 1), special_tokens=5)
    one_line(error)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, grid=st.tuples(st.integers(0, 4), st.integers(0, 4)), special=st.integers(-1, 5))
def test_mask_head_shapes(shape, grid, special):
    parameters = [torch.zeros(shape) for shape in [(8, 1, 3, 3), (8,), (4, 8, 1, 1), (4,), (1, 4, 1, 1), (1,)]]
    with pytest.raises((ValueError, TypeError)) as error:
        mask_head(torch.zeros(shape), *parameters, grid=grid, special_tokens=special)
    one_line(error)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, grid=st.tuples(st.integers(0, 4), st.integers(0, 4)), special=st.integers(-1, 5))
def test_qk_norm_rope_shapes(shape, grid, special):
    cos, sin = rope_tables((4, 4), 16)
    with pytest.raises((ValueError, TypeError)) as error:
        qk_norm_rope(torch.zeros(shape), *(torch.zeros(16) for _ in range(4)), cos, sin, grid=grid, special_tokens=special)
    one_line(error)


def test_weights_are_floating_point():
    whole = [torch.zeros(shape, dtype=torch.int64) for shape in [(8, 1, 3, 3), (8,), (4, 8, 1, 1), (4,), (1, 4, 1, 1), (1,)]]
    with pytest.raises(TypeError, match="not int64"):
        mask_head(torch.zeros(1, 1, 9, 8), *whole, grid=(2, 2), special_tokens=5)
    cos, sin = (table.long() for table in rope_tables((2, 2), 16))
    with pytest.raises(TypeError, match="not int64"):
        qk_norm_rope(torch.zeros(1, 4, 3, 1, 16), *(torch.zeros(16) for _ in range(4)), cos, sin, grid=(2, 2), special_tokens=0)


def test_qk_norm_rope_tables_too_short():
    cos, sin = rope_tables((2, 2), 16)
    with pytest.raises(ValueError, match="at least 4") as error:
        qk_norm_rope(torch.zeros(1, 6, 3, 1, 16), *(torch.zeros(16) for _ in range(4)), cos, sin, grid=(2, 3), special_tokens=0)
    one_line(error)
