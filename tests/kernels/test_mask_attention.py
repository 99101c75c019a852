"""Every attention backend against the float64 oracle, forward and backward, on the shapes that break kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from page4d_kernels import BackendError, TokenLayout, mask_attention
from page4d_kernels.backends.mask_attention import BACKENDS, chunked, sdpa_rows
from page4d_kernels.testing import (
    assert_within_budget,
    attention_gradients,
    attention_inputs,
    default_device,
    gradient_slack,
    oracle_attention,
    plain_attention,
)

UNAVAILABLE = [backend.name for backend in BACKENDS if backend.unavailable()]
# FlexAttention is compiled per case, seconds each: it has a test of its own below
NAMES = [backend.name for backend in BACKENDS if backend.name not in (*UNAVAILABLE, "flex")]
NO_FLOAT64 = ("triton", "cpu", "sdpa_rows")
COMMON = {"cpu": torch.float32, "cuda": torch.bfloat16}  # what most backends serve
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


RAGGED = TokenLayout(3, 59, 5)


@dataclass(frozen=True)
class Case:
    name: str
    layout: TokenLayout = RAGGED
    batch: int = 1
    heads: int = 2
    head_dim: int = 64
    packed: bool = False
    strength: float = 64.0
    spread: float = 1.0
    promise: bool = True  # pass the layout
    zero: str = ""  # the vector to set to 0, or "both" for no bias at all
    scale: float | None = None


CASES = [
    Case("ragged"),
    Case("batch of packed views", batch=2, packed=True),
    Case("no layout", promise=False),
    Case("1374 tokens per frame cut down", TokenLayout(2, 137, 5), heads=3),
    Case("893 tokens", TokenLayout(1, 893, 5), heads=1),
    Case("head dim 16", head_dim=16),
    Case("head dim 32", head_dim=32),
    Case("head dim 128", head_dim=128, heads=1),
    Case("zero gate", zero="query_gate"),
    Case("zero bias", zero="key_bias"),
    Case("no bias", zero="both"),
    Case("no special tokens", TokenLayout(2, 50, 0)),
    Case("only special tokens", TokenLayout(2, 5, 5)),
    Case("single token", TokenLayout(1, 1, 1)),
    Case("huge logits", spread=12.0),
    Case("strong gate", strength=256.0),
    Case("negative gate", strength=-64.0),
    Case("another scale", scale=0.31),
]


def make(case: Case, dtype: torch.dtype, device: str, seed: int = 0):
    inputs = attention_inputs(
        case.layout,
        batch=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=dtype,
        device=device,
        strength=case.strength,
        spread=case.spread,
        packed=case.packed,
        seed=seed,
    )
    if case.zero == "both":
        inputs = dataclasses.replace(inputs, query_gate=None, key_bias=None)
    elif case.zero:
        inputs = dataclasses.replace(inputs, **{case.zero: torch.zeros_like(getattr(inputs, case.zero))})
    return inputs if case.promise else dataclasses.replace(inputs, layout=None)


def scale_of(case: Case) -> float:
    return case.scale or case.head_dim**-0.5


@pytest.mark.parametrize("backend", UNAVAILABLE)
def test_a_backend_that_is_missing_says_why_and_never_falls_back(backend):
    inputs = make(CASES[0], torch.float32, "cpu")
    with pytest.raises(BackendError, match=rf"backend '{backend}' cannot serve this: .+ \(backends that could: .*sdpa"):
        inputs.attend(backend)


def test_every_backend_serves_an_ordinary_call(backend, device):
    """The tests below end early for what a backend refuses, so none may refuse everything."""
    assert not make(CASES[0], COMMON[device], device).reasons(backend)


def allowance(backend: str, dtype: torch.dtype, inputs) -> float:
    """The official arithmetic rounds gate and bias to the input dtype: about 0.12 logits in bf16, which is why it is only a baseline."""
    if backend == "sdpa_augmented" and inputs.query_gate is not None:
        return {torch.float32: 8.0, torch.float16: 8.0, torch.bfloat16: 40.0}[dtype]
    return 2.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(backend, case, dtype, device, poisoned_empty):
    inputs = make(case, dtype, device)
    if inputs.reasons(backend):
        return
    scale = scale_of(case)
    oracle, _ = oracle_attention(inputs, scale)
    out = inputs.attend(backend, scale=case.scale)
    assert out.shape == inputs.q.shape and out.dtype == dtype
    assert_within_budget("out", out, oracle, plain_attention(inputs, scale), allowance(backend, dtype, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(backend, case, dtype, device, poisoned_empty):
    inputs = make(case, dtype, device).requires_grad_()
    if inputs.reasons(backend):
        return
    scale = scale_of(case)
    d_out = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    exact = inputs.to(torch.float64).requires_grad_()
    out, lse = oracle_attention(exact, scale)
    oracle = attention_gradients(out, exact, d_out)
    slack = gradient_slack(exact, out, lse, d_out, scale)
    low = inputs.to(dtype).requires_grad_()
    plain = attention_gradients(plain_attention(low, scale), low, d_out)
    for name, gradient in attention_gradients(inputs.attend(backend, scale=case.scale), inputs, d_out).items():
        if name == "query_gate" and inputs.layout is not None:  # the layout makes the rest of the gate constant
            special = inputs.layout.only_special(torch.ones_like(gradient)).bool()
            assert not gradient[~special].any()
            oracle[name], plain[name] = oracle[name].where(special, 0.0), plain[name].where(special, 0.0)
        assert gradient.dtype == getattr(inputs, name).dtype
        assert_within_budget(name, gradient, oracle[name], plain[name], allowance(backend, dtype, inputs), slack[name])


@pytest.mark.parametrize("name", ["query_gate", "key_bias"])
def test_output_depends_on_the_bias(backend, name, device):
    """A mask that is silently dropped is the worst bug of all."""
    inputs = make(CASES[0], COMMON[device], device)
    if inputs.reasons(backend):
        return
    gated = inputs.layout.only_special(torch.ones_like(inputs.query_gate)).bool()[:, None, :, None]
    changed = dataclasses.replace(inputs, **{name: getattr(inputs, name) * 0.5})
    difference = (inputs.attend(backend) - changed.attend(backend)).abs()
    assert difference.where(gated, 0.0).max() > 1e-2
    assert difference.where(~gated, 0.0).max() == 0


def test_repeats_are_bit_equal(backend, device):
    inputs = make(CASES[1], COMMON[device], device).requires_grad_()
    if inputs.reasons(backend):
        return
    d_out = torch.randn_like(inputs.q)
    first = attention_gradients(inputs.attend(backend), inputs, d_out)
    for _ in range(5):
        for name, gradient in attention_gradients(inputs.attend(backend), inputs, d_out).items():
            assert torch.equal(gradient, first[name]), name


@pytest.mark.parametrize("backend", [name for name in NAMES if BACKENDS.get(name).backward is not None])
class TestLibraryOperator:
    """Backends that run inside the torch.library operator."""

    def test_opcheck(self, backend):
        for promise in (True, False):
            inputs = make(
                Case("small", TokenLayout(2, 11, 3), batch=2, head_dim=16, promise=promise), torch.float32, default_device(backend)
            )
            layout = [2, 11, 3] if promise else None
            torch.library.opcheck(
                torch.ops.page4d.mask_attention.default,
                (*inputs.requires_grad_().tensors(), layout, 0.25, backend),
            )

    def test_log_sum_exp(self, backend):
        inputs = make(CASES[1], torch.float32, default_device(backend))
        out, lse = inputs.attend(backend, return_lse=True)
        oracle, oracle_lse = oracle_attention(inputs, 0.125)
        assert (out - oracle).abs().max() < 1e-5
        assert (lse - oracle_lse).abs().max() < 1e-5

    def test_key_chunks_merge_by_log_sum_exp(self, backend):
        """Partial results over two ranges of keys, merged, with gradients through the log-sum-exp."""
        dtype, tolerance = (torch.float32, 1e-3) if backend in NO_FLOAT64 else (torch.float64, 1e-9)
        exact = make(dataclasses.replace(CASES[0], promise=False), dtype, default_device(backend)).requires_grad_()
        outs, lses = [], []
        for keys in (slice(0, 100), slice(100, None)):
            out, lse = mask_attention(
                exact.q,
                exact.k[:, :, keys],
                exact.v[:, :, keys],
                exact.query_gate,
                exact.key_bias[:, keys],
                backend=backend,
                return_lse=True,
            )
            outs.append(out)
            lses.append(lse)
        weights = torch.stack(lses).softmax(0).unsqueeze(-1)
        merged = (torch.stack(outs) * weights).sum(0)
        whole = exact.attend("reference")
        assert torch.allclose(merged, whole, atol=tolerance)
        d_out = torch.randn_like(whole)
        expected = attention_gradients(whole, exact, d_out)
        for name, gradient in attention_gradients(merged, exact, d_out).items():
            assert torch.allclose(gradient, expected[name], atol=tolerance, rtol=tolerance), name

    def test_row_without_finite_logit_is_zero_and_nan_stays_in_its_row(self, backend):
        inputs = make(CASES[0], torch.float32, default_device(backend))
        inputs.q[..., 0], inputs.k[..., 0] = 0, -1e30
        inputs.q[:, :, 7] = 0
        inputs.q[:, :, 7, 0] = 1e30
        inputs.q[:, :, 20, 3] = torch.nan
        out = inputs.attend(backend)
        assert not out[:, :, 7].any()
        assert out[:, :, 20].isnan().all()
        assert out.isnan().any(-1).sum() == inputs.q.shape[1]

    def test_gradcheck(self, backend):
        if backend in NO_FLOAT64:
            pytest.skip("it has no float64")
        inputs = make(Case("small", TokenLayout(2, 5, 2), head_dim=4, strength=2.0, promise=False), torch.float64, "cpu")
        inputs.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda *tensors: mask_attention(*tensors, backend=backend, return_lse=True), tuple(inputs.tensors()), fast_mode=True
        )


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2]], ids=lambda case: case.name)
def test_chunked_over_many_tiles(case, monkeypatch):
    """Tiles that divide nothing: every running sum is carried over several tiles of rows and keys."""
    monkeypatch.setattr(chunked, "_tile_sizes", lambda q, k: (48, 37))
    exact = make(case, torch.float64, "cpu").requires_grad_()
    out, lse = exact.attend("chunked", return_lse=True)
    expected, expected_lse = exact.attend("reference", return_lse=True)
    assert torch.allclose(out, expected, atol=1e-12) and torch.allclose(lse, expected_lse, atol=1e-12)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    leaves = exact.tensors()
    found = torch.autograd.grad([out, lse], leaves, [d_out, d_lse])
    for x, y in zip(found, torch.autograd.grad([expected, expected_lse], leaves, [d_out, d_lse]), strict=True):
        assert torch.allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_sdpa_rows_over_split_keys(splits, dtype, monkeypatch):
    """Splits that divide the keys, and that leave some over. The six products hold a gate of 100.3 to the rounding of fp32."""
    monkeypatch.setattr(sdpa_rows, "_splits", lambda q, keys: splits)
    inputs = make(dataclasses.replace(CASES[1], promise=False, strength=100.3), dtype, "cpu")
    oracle, oracle_lse = oracle_attention(inputs, 0.125)
    out, lse = inputs.attend("sdpa_rows", return_lse=True)
    assert_within_budget("out", out, oracle, plain_attention(inputs, 0.125))
    assert (lse - oracle_lse).abs().max() < 1e-4
    assert (out.double() - oracle).norm() < (1e-4 if dtype == torch.float32 else 4e-3) * oracle.norm()


def test_strided_gate_and_bias(backend, device):
    """Views with any stride along the tokens: every second entry of longer vectors."""
    inputs = make(CASES[1], COMMON[device], device)
    if inputs.reasons(backend):
        return
    wide = {name: getattr(inputs, name).repeat_interleave(2, 1)[:, ::2] for name in ("query_gate", "key_bias")}
    strided = dataclasses.replace(inputs, **wide)
    assert strided.query_gate.stride(1) == 2
    d_out = torch.randn_like(inputs.q)
    results = []
    for case in (inputs, strided):
        leaves = case.requires_grad_()
        out = leaves.attend(backend)
        results.append([out, *attention_gradients(out, leaves, d_out).values()])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_very_negative_logits(backend, device):
    """All logits near -200: whatever lies past the last key (logit 0) would be exp(200) if it were not masked out."""
    inputs = make(CASES[0], COMMON[device], device)
    if inputs.reasons(backend):
        return
    inputs = dataclasses.replace(inputs, q=inputs.q * 0.1 + 5, k=inputs.k * 0.1 - 5).requires_grad_()
    d_out = torch.randn_like(inputs.q)
    out, expected = (inputs.attend(name) for name in (backend, "reference"))
    tolerance = 1e-3 if inputs.q.dtype == torch.float32 else 0.1
    assert torch.allclose(out, expected, atol=tolerance)
    gradients = attention_gradients(expected, inputs, d_out)
    for name, gradient in attention_gradients(out, inputs, d_out).items():
        assert (gradient - gradients[name]).abs().max() <= tolerance * max(1, gradients[name].abs().max()), name


def test_autocast_changes_nothing(backend, device):
    """The dtypes of an op are its own: autocast would round the logits, bias included."""
    inputs = make(CASES[0], torch.bfloat16, device).requires_grad_()
    if inputs.reasons(backend):
        return
    d_out = torch.randn_like(inputs.q)
    plain = inputs.attend(backend)
    expected = attention_gradients(plain, inputs, d_out)
    with torch.autocast(device, torch.bfloat16):
        out = inputs.attend(backend)
        found = attention_gradients(out, inputs, d_out)
    assert torch.equal(out, plain)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    single = make(CASES[0], torch.float32, "cpu")
    if device == default_device(backend) == "cpu":
        with torch.autocast("cpu", torch.bfloat16):
            assert single.attend(backend).dtype == torch.float32


@pytest.mark.slow
def test_compiles_without_graph_break(backend):
    inputs = make(
        CASES[0], COMMON["cuda"] if default_device(backend) == "cuda" else torch.float32, default_device(backend)
    ).requires_grad_()
    compiled = torch.compile(lambda *tensors: mask_attention(*tensors, layout=inputs.layout, backend=backend), fullgraph=True)
    out = compiled(*inputs.tensors())
    d_out = torch.randn_like(out)
    expected = attention_gradients(inputs.attend(backend), inputs, d_out)
    for name, gradient in attention_gradients(out, inputs, d_out).items():
        assert torch.allclose(gradient, expected[name], atol=1e-4 if gradient.dtype == torch.float32 else 2e-2), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_attention(dtype, device):
    inputs = make(Case("packed", batch=2, packed=True), dtype, device)
    if inputs.reasons("flex"):
        return
    oracle, _ = oracle_attention(inputs, 0.125)
    out = inputs.attend("flex")
    assert_within_budget("out", out, oracle, plain_attention(inputs, 0.125))
    changed = dataclasses.replace(inputs, key_bias=inputs.key_bias * 0.5)
    assert (changed.attend("flex") - out).abs().max() > 1e-2
    for tokens in (40, 75, 90):  # other lengths
        other = make(Case("length", TokenLayout(1, tokens, 5)), dtype, device)
        assert_within_budget("out", other.attend("flex"), oracle_attention(other, 0.125)[0], plain_attention(other, 0.125))
    with pytest.raises(BackendError, match="no deterministic gradient for key_bias"):
        dataclasses.replace(inputs, key_bias=inputs.key_bias.clone().requires_grad_()).attend("flex")


@pytest.mark.parametrize(("backend", "device"), [("sdpa", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)])
def test_bf16_gated_rows_are_closer_than_the_official_arithmetic(backend, device, capsys):
    """Root mean square over the gated rows against float64, c ~ U(-1/2, 1/2), alpha = 64."""
    layout = TokenLayout(8, 180, 5)
    inputs = attention_inputs(layout, heads=16, dtype=torch.bfloat16, device=device)
    oracle, _ = oracle_attention(inputs, 0.125)

    def error(backend):
        difference = inputs.attend(backend).double() - oracle
        return float(layout.special(difference, 2).square().mean().sqrt())

    ours, official = error(backend), error("sdpa_augmented")
    with capsys.disabled():
        print(f"\nbf16 gated rows, rms error: {backend} {ours:.2e}, sdpa_augmented {official:.2e}, {official / ours:.1f}x")
    assert official >= 8 * ours


@pytest.fixture
def folds(monkeypatch):
    """How often `sdpa` has folded a bias into channels."""
    from page4d_kernels.backends.mask_attention import bias_channels

    calls, fold = [], bias_channels.fold
    monkeypatch.setattr(bias_channels, "fold", lambda *arguments: calls.append(1) or fold(*arguments))
    return calls


def every_row(dtype=torch.float32, heads=4, scale=1.0):
    inputs = attention_inputs(TokenLayout(2, 40, 3), heads=heads, dtype=dtype, head_dim=16)
    ones = torch.ones_like(inputs.query_gate)
    return dataclasses.replace(inputs, query_gate=ones, key_bias=inputs.key_bias * scale, layout=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at_once", [1, 160, 10**6])
def test_sdpa_folds_the_bias_of_all_rows(folds, monkeypatch, dtype, at_once):
    """Whatever number of heads at a time."""
    from page4d_kernels.backends.mask_attention import sdpa

    monkeypatch.setattr(sdpa, "ROWS_AT_ONCE", at_once)
    inputs = every_row(dtype, scale=8.0)
    out = inputs.attend("sdpa")
    assert len(folds) == {1: 4, 160: 2, 10**6: 1}[at_once] and out.shape == inputs.q.shape
    assert_within_budget("out", out, oracle_attention(inputs, 0.25)[0], plain_attention(inputs, 0.25))


@pytest.mark.parametrize("wanted", ["query_gate", "key_bias"])
def test_sdpa_folds_no_bias_whose_gradient_is_wanted(folds, wanted):
    inputs = every_row()
    inputs = dataclasses.replace(inputs, **{wanted: getattr(inputs, wanted).clone().requires_grad_()})
    out = inputs.attend("sdpa")
    (gradient,) = torch.autograd.grad(out.square().sum(), [getattr(inputs, wanted)])
    (expected,) = torch.autograd.grad(inputs.attend("chunked").square().sum(), [getattr(inputs, wanted)])
    assert not folds and torch.equal(gradient, expected)


def test_sdpa_folds_no_bias_of_fp16(folds):
    every_row(torch.float16).attend("sdpa")
    assert not folds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extreme", [torch.finfo(torch.float32).min, -1e4, 1e38])
def test_folded_biases_may_be_extreme(dtype, extreme):
    inputs = every_row(dtype)
    gate = inputs.query_gate.clone()
    gate[:, ::2] = 0
    bias = inputs.key_bias.clone()
    bias[:, ::3] = extreme
    inputs = dataclasses.replace(inputs, query_gate=gate, key_bias=bias)
    expected = inputs.attend("chunked").float()
    assert (inputs.attend("sdpa").float() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 3e-2)


def test_a_folded_bias_survives_matmuls_that_round(monkeypatch):
    """A processor may compute fp32 matmuls in bf16: the parts of the bias are then exact in bf16."""
    from page4d_kernels.backends.mask_attention.bias_channels import fold

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")

    inputs = every_row(scale=16.0)
    q, k = fold(torch.zeros_like(inputs.q), torch.zeros_like(inputs.k), 64 * inputs.query_gate, inputs.key_bias, 0.25)
    assert torch.equal(q, q.bfloat16().float()) and torch.equal(k, k.bfloat16().float())
    expected = 64 * inputs.query_gate[:, None, :, None] * inputs.key_bias[:, None, None, :]
    assert ((q.double() @ k.double().mT) * 0.25 - expected).abs().max() < 2e-6 * expected.abs().max()
