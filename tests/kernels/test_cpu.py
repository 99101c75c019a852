"""The compiled CPU kernels on every instruction set this processor has: odd shapes and strides, threads, the build record."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from page4d_kernels import BackendError, TokenLayout, env, mask_attention, mask_head, native, qk_norm_rope, rope_tables
from page4d_kernels.backends.mask_attention import BACKENDS as ATTENTION
from page4d_kernels.backends.mask_attention.problem import AttentionProblem
from page4d_kernels.backends.mask_head import BACKENDS as HEAD
from page4d_kernels.backends.mask_head.problem import MaskHeadProblem
from page4d_kernels.backends.qk_norm_rope import BACKENDS as ROPE
from page4d_kernels.backends.qk_norm_rope.problem import QkNormRopeProblem
from page4d_kernels.testing import assert_within_budget, attention_inputs, oracle_attention, plain_attention

LEVELS = [] if native.why_missing() else list(native.LEVELS[: native.LEVELS.index(native.best_level()) + 1])
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("PAGE4D_CPU_LEVEL", request.param)
    return request.param


@pytest.mark.skipif(bool(LEVELS), reason="the compiled library is here")
def test_an_absent_library_is_explained():
    x = torch.randn(1, 1, 3, 16)
    with pytest.raises(BackendError, match=r"the compiled library: it was not built: .+"):
        mask_attention(x, x, x, backend="cpu")


SHAPES = [  # frames, tokens per frame, special, batch, heads, head dim
    (1, 1, 1, 1, 1, 16),
    (1, 17, 5, 1, 1, 64),
    (2, 257, 5, 1, 2, 64),  # one key more than two tiles, a chunk of rows and a bit
    (1, 385, 5, 2, 1, 40),
    (3, 43, 5, 1, 3, 128),
    (1, 33, 0, 1, 1, 1),
    (1, 30, 5, 1, 1, 7),
    (1, 9, 5, 33, 17, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(level, shape, dtype):
    frames, tokens, special, batch, heads, head_dim = shape
    inputs = attention_inputs(TokenLayout(frames, tokens, special), batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, packed=True)
    scale = head_dim**-0.5
    oracle, oracle_lse = oracle_attention(inputs, scale)
    out, lse = mask_attention(*inputs.tensors(), layout=inputs.layout, backend="cpu", return_lse=True)
    assert_within_budget("out", out, oracle, plain_attention(inputs, scale))
    assert (lse - oracle_lse).abs().max() < (1e-5 if dtype == torch.float32 else 2e-5) * max(1.0, float(oracle_lse.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(level, dtype):
    inputs = attention_inputs(TokenLayout(2, 450, 5), heads=5, dtype=dtype)  # one chunk of rows per head, or two for five threads
    tokens, parameters = head_inputs(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([mask_attention(*inputs.tensors(), backend="cpu"), mask_head(tokens, *parameters, **WHERE, backend="cpu")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


WHERE = {"grid": (7, 9), "special_tokens": 5}


def head_inputs(dtype, channels=100, hidden=40):
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(2, 3, 68, channels, generator=generator) * 3 + 1).to(dtype)
    shapes = [(channels, 1, 3, 3), (channels,), (hidden, channels, 1, 1), (hidden,), (1, hidden, 1, 1), (1,)]
    return tokens, [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 64, 100])
def test_mask_head(level, channels, dtype):
    tokens, parameters = head_inputs(dtype, channels)
    out = mask_head(tokens, *parameters, **WHERE, backend="cpu")
    exact = mask_head(tokens.double(), *(p.double() for p in parameters), **WHERE, backend="reference")
    assert (out - exact).abs().max() < (2e-6 if dtype == torch.float32 or level in ("scalar", "avx2", "avx512") else 5e-3)
    spread = torch.zeros(2, 3, 68, channels, 3, dtype=dtype)
    spread[..., 1] = tokens
    assert torch.equal(mask_head(spread[..., 1], *parameters, **WHERE, backend="cpu"), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [4, 40, 64])
def test_qk_norm_rope(level, head_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 2 * 68, 3, 3, head_dim, generator=generator).to(dtype)
    vectors = [torch.randn(head_dim, generator=generator).to(dtype) for _ in range(4)]
    tensors = (qkv, *vectors, *rope_tables((7, 9), head_dim))
    for found, exact in zip(
        qk_norm_rope(*tensors, **WHERE, backend="cpu"), qk_norm_rope(*tensors, **WHERE, backend="reference"), strict=True
    ):
        assert (found.float() - exact.float()).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    level=st.sampled_from(LEVELS or ["scalar"]),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 400), st.integers(1, 600), st.integers(1, 130)),
    offset=st.integers(0, 3),
    gap=st.integers(0, 5),
    biased=st.booleans(),
)
@pytest.mark.skipif(not LEVELS, reason="the compiled library is not here")
def test_any_shape_and_stride(level, dtype, sizes, offset, gap, biased):
    """Rows `gap` elements longer than the head dim, starting `offset` elements into a buffer: no alignment can be relied on."""
    batch, heads, queries, keys, head_dim = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def view(tokens):
        row = head_dim + gap
        buffer = torch.full((offset + batch * heads * tokens * row + 8,), float("nan"), dtype=dtype)
        x = buffer[offset:].as_strided((batch, heads, tokens, head_dim), (tokens * heads * row, row, heads * row, 1))
        return x.copy_(torch.randn(x.shape, generator=generator))

    q, k, v = view(queries), view(keys), view(keys)
    vectors = [torch.randn(batch, n, generator=generator) * 8 for n in (queries, keys)] if biased else [None, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAGE4D_CPU_LEVEL", level)
        out = mask_attention(q, k, v, *vectors, backend="cpu")
    exact = mask_attention(q.double(), k.double(), v.double(), *vectors_in_double(vectors), backend="reference")
    assert (out.double() - exact).abs().max() <= (3e-5 if dtype == torch.float32 else 3e-2) * exact.abs().max().clamp_min(1.0)


def vectors_in_double(vectors):
    return [None if x is None else x.double() for x in vectors]


def test_an_unknown_level_is_named(monkeypatch):
    if not LEVELS:
        pytest.skip("the compiled library is not here")
    monkeypatch.setenv("PAGE4D_CPU_LEVEL", "avx3")
    x = torch.randn(1, 1, 3, 16)
    with pytest.raises(env.VariableError, match="PAGE4D_CPU_LEVEL='avx3': choose one of scalar, avx2"):
        mask_attention(x, x, x, backend="cpu")


@pytest.mark.skipif("avx512" not in LEVELS, reason="auto takes the compiled attention from AVX-512 on")
def test_auto_takes_the_compiled_kernels_where_they_are_faster(monkeypatch):
    """docs/cpu.md and benchmarks/results/ have the measurements."""
    problem = AttentionProblem("cpu", torch.float32, 1, 16, 1786, 1786, 64, biased=True)
    assert ATTENTION.choose(problem).name == "cpu"
    assert ATTENTION.choose(dataclasses.replace(problem, dtype=torch.bfloat16, keys=100)).name == "cpu"
    for other in ({"needs_grad": frozenset({"q"})}, {"dtype": torch.float64}, {"keys": 100}, {"dtype": torch.float16}):
        changed = dataclasses.replace(problem, **other)
        assert ATTENTION.choose(changed).name == "sdpa", other
    assert ATTENTION.choose(dataclasses.replace(problem, needs_grad=frozenset({"q"})), "cpu").name == "cpu"  # named, it serves
    monkeypatch.setenv("PAGE4D_CPU_LEVEL", "avx2")
    assert ATTENTION.choose(problem).name == "sdpa"


@pytest.mark.skipif("avx2" not in LEVELS, reason="there are only plain loops")
def test_auto_passes_plain_loops_over(monkeypatch):
    head = MaskHeadProblem("cpu", torch.float32, 1, 2, (3, 4), 5, 64, 16)
    problems = {HEAD: head, ROPE: QkNormRopeProblem("cpu", torch.float32, 1, 34, 2, 64, (3, 4), 5)}
    assert [registry.choose(problem).name for registry, problem in problems.items()] == ["cpu", "cpu"]
    monkeypatch.setenv("PAGE4D_CPU_LEVEL", "scalar")
    assert [registry.choose(problem).name for registry, problem in problems.items()] == ["reference", "reference"]


class TestLoading:
    @pytest.fixture(autouse=True)
    def fresh(self):
        native._load.cache_clear()
        yield
        native._load.cache_clear()

    def pretend(self, monkeypatch, tmp_path, record):
        def absent(name):
            raise ImportError("no module named page4d_kernels._native")

        path = tmp_path / "build_record.json"
        if record is not None:
            path.write_text(json.dumps(record))
        monkeypatch.setattr(native, "_RECORD", path)
        monkeypatch.setattr(native.importlib, "import_module", absent)

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            (None, "it was not built: build it again with `pip install -e .`"),
            ({"built": False, "reason": "cmake is not installed"}, "it was not built: cmake is not installed"),
            ({"built": True, "reason": ""}, r"it does not load \(no module named"),
        ],
    )
    def test_absent(self, record, reason, monkeypatch, tmp_path):
        self.pretend(monkeypatch, tmp_path, record)
        x = torch.randn(1, 1, 3, 16)
        with pytest.raises(BackendError, match=f"backend 'cpu' cannot serve this: the compiled library: {reason}"):
            mask_attention(x, x, x, backend="cpu")
        with pytest.raises(RuntimeError, match=reason):
            native.library()

    @pytest.mark.skipif(not LEVELS, reason="the compiled library is not here")
    def test_a_library_from_other_sources_is_refused(self, monkeypatch):
        monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
        reason = rf"it was built from other sources \(interface {native.INTERFACE - 1}, these sources need {native.INTERFACE}\)"
        with pytest.raises(RuntimeError, match=reason):
            native.library()

    def test_gradients_go_through(self):
        if not LEVELS:
            pytest.skip("the compiled library is not here")
        inputs = attention_inputs(TokenLayout(1, 30, 5), head_dim=16)
        leaves = dataclasses.replace(inputs).requires_grad_()
        out = mask_attention(*leaves.tensors(), layout=leaves.layout, backend="cpu")
        assert all(x is not None for x in torch.autograd.grad(out.sum(), leaves.tensors()))
