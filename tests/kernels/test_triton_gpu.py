"""The Triton kernels on a GPU at real sizes: long sequences, races, 64-bit offsets, CUDA graphs, compute-sanitizer.

The shared suites run there as well, with their own `gpu` variants; `pytest -m gpu` is all of it.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from page4d_kernels import TokenLayout, mask_attention, mask_head, qk_norm_rope, residual_norm, rope_tables
from page4d_kernels.testing import (
    AttentionInputs,
    assert_within_budget,
    attention_gradients,
    attention_inputs,
    gradient_slack,
    oracle_attention,
    plain_attention,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

GRID = (24, 37)
FRAME = TokenLayout(1, 893, 5)
HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32]


def frames(count: int) -> TokenLayout:
    return dataclasses.replace(FRAME, frames=count)


def call(inputs: AttentionInputs, backend: str = "triton"):
    return mask_attention(*inputs.tensors(), layout=inputs.layout, backend=backend)


def some_rows(layout: TokenLayout) -> torch.Tensor:
    """All gated rows, and 512 others, the last one among them."""
    rows = torch.arange(layout.tokens)
    gated = rows % layout.tokens_per_frame < layout.special_tokens
    others = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(0))[:511]
    return torch.cat([rows[gated], others, rows[-1:]]).unique().cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("promise", [True, False], ids=["layout", "no layout"])
@pytest.mark.parametrize("count", [10, 45])
def test_long_forward(count, promise, dtype):
    """8 930 and 40 185 tokens, out of a packed projection, against float64."""
    inputs = attention_inputs(frames(count), dtype=dtype, packed=True, device="cuda")
    out = call(inputs if promise else dataclasses.replace(inputs, layout=None))
    rows = some_rows(inputs.layout)
    sample = dataclasses.replace(inputs, q=inputs.q[:, :, rows], query_gate=inputs.query_gate[:, rows], layout=None)
    oracle, _ = oracle_attention(sample, 0.125)
    assert_within_budget("out", out[:, :, rows], oracle, plain_attention(sample, 0.125))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [4, 10])
def test_long_gradients(count, dtype):
    """3 572 and 8 930 tokens: all gradients against float64."""
    inputs = attention_inputs(frames(count), heads=1, dtype=dtype, packed=True, device="cuda").requires_grad_()
    d_out = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    exact = inputs.to(torch.float64).requires_grad_()
    out, lse = oracle_attention(exact, 0.125)
    oracle = attention_gradients(out, exact, d_out)
    slack = gradient_slack(exact, out, lse, d_out, 0.125)
    low = inputs.to(dtype).requires_grad_()
    plain = attention_gradients(plain_attention(low, 0.125), low, d_out)
    for name, gradient in attention_gradients(call(inputs), inputs, d_out).items():
        if name == "query_gate":
            special = inputs.layout.only_special(torch.ones_like(gradient)).bool()
            oracle[name], plain[name] = oracle[name].where(special, 0.0), plain[name].where(special, 0.0)
        assert_within_budget(name, gradient, oracle[name], plain[name], 2.0, slack[name])


def test_gradients_at_40k_tokens():
    """Against the chunked backend in fp32, which holds no N x N either. The gradients agree to the rounding of bf16.

    dr_i weighs dS, whose rows sum to 0, with biases of either sign: the output's rounding (in delta) weighs more there.
    """
    inputs = attention_inputs(frames(45), heads=1, dtype=torch.bfloat16, packed=True, device="cuda").requires_grad_()
    exact = inputs.to(torch.float32).requires_grad_()
    d_out = torch.randn_like(inputs.q)
    expected = attention_gradients(mask_attention(*exact.tensors(), layout=exact.layout, backend="chunked"), exact, d_out)
    for name, gradient in attention_gradients(call(inputs), inputs, d_out).items():
        error = (gradient.float() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-1 if name == "query_gate" else 2e-2), f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_200_repeats_are_bit_equal(dtype):
    inputs = attention_inputs(frames(4), heads=8, dtype=dtype, packed=True, device="cuda").requires_grad_()
    d_out = torch.randn_like(inputs.q)

    def once():
        out = call(inputs)
        return [out.detach(), *attention_gradients(out, inputs, d_out).values()]

    first = once()
    for repeat in range(200):
        assert all(torch.equal(x, y) for x, y in zip(once(), first, strict=True)), f"repeat {repeat} differs"


def test_200_repeats_of_the_other_ops_are_bit_equal():
    tokens, parameters = mask_head_inputs(torch.bfloat16)
    qkv, vectors, tables = qk_inputs(torch.bfloat16)
    residual = residual_inputs()

    def once():
        bias = mask_head(tokens, *parameters, grid=GRID, special_tokens=5, backend="triton")
        q, k, _ = qk_norm_rope(qkv, *vectors, *tables, grid=GRID, special_tokens=5, backend="triton")
        total, normal = residual_norm(*residual, backend="triton")
        roots = [bias.sum(), q.sum() + 2 * k.sum(), total.square().sum() + normal.sum()]
        gradients = torch.autograd.grad(roots, [*parameters, qkv, *vectors, *residual])
        return [bias.detach(), q.detach(), k.detach(), total.detach(), normal.detach(), *gradients]

    first = once()
    for repeat in range(200):
        assert all(torch.equal(x, y) for x, y in zip(once(), first, strict=True)), f"repeat {repeat} differs"


def mask_head_inputs(dtype, count=4):
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randn(1, count, 893, 1024, generator=generator) * 3 + 1).to("cuda", dtype)
    shapes = [(1024, 1, 3, 3), (1024,), (256, 1024, 1, 1), (256,), (1, 256, 1, 1), (1,)]
    return tokens, [(torch.randn(shape, generator=generator) * 0.1).cuda().requires_grad_() for shape in shapes]


def qk_inputs(dtype, count=4):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, count * 893, 3, 16, 64, generator=generator).to("cuda", dtype).requires_grad_()
    vectors = [torch.randn(64, generator=generator).to("cuda", dtype).requires_grad_() for _ in range(4)]
    return qkv, vectors, rope_tables(GRID, 64, device="cuda")


def residual_inputs(count=4):
    """The fp32 stream, a branch in bf16, and LayerScale and LayerNorm's parameters."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, count * 893, 1024, generator=generator) for _ in range(2)]
    tensors += [torch.randn(1024, generator=generator) for _ in range(3)]
    return [x.to("cuda", torch.bfloat16 if i == 1 else torch.float32).requires_grad_() for i, x in enumerate(tensors)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_head_at_the_official_size(dtype):
    """1024 channels, 256 hidden, 24 x 37 patches. The head in float64 is the oracle, in its own dtype the budget."""
    tokens, parameters = mask_head_inputs(dtype)
    parameters = [p.detach().to(dtype).requires_grad_() for p in parameters]
    d_out = torch.randn(1, 4 * 893, device="cuda")

    def results(dtype, backend):
        leaves = [p.detach().to(dtype).requires_grad_() for p in parameters]
        bias = mask_head(tokens.to(dtype), *leaves, grid=GRID, special_tokens=5, backend=backend)
        return [bias, *torch.autograd.grad(bias, leaves, d_out.to(bias.dtype))]

    names = ("bias", "w0", "b0", "w2", "b2", "w4", "b4")
    for name, found, exact in zip(names, results(dtype, "triton"), results(torch.float64, "reference"), strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]  # tf32 products; gradients rounded to dtype
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max(), name


def test_offsets_past_two_to_the_31_in_strides():
    """Views whose last row lies more than 2^31 elements behind the first."""
    tokens, stride = 2 * 893, 1 << 21
    buffer = torch.empty(tokens * stride, dtype=torch.bfloat16, device="cuda")  # 7 GB
    assert tokens * stride > 1 << 31
    qkv = buffer.as_strided((1, tokens, 3, 2, 64), (tokens * stride, stride, 128, 64, 1))
    qkv.copy_(torch.randn(qkv.shape, dtype=torch.bfloat16, device="cuda"))
    dense = attention_inputs(frames(2), dtype=torch.bfloat16, device="cuda")
    wide = dataclasses.replace(dense, **dict(zip("qkv", qkv.permute(2, 0, 3, 1, 4), strict=True)))
    close = dataclasses.replace(wide, **{name: getattr(wide, name).contiguous() for name in "qkv"})
    d_out = torch.randn(close.q.shape, dtype=torch.bfloat16, device="cuda")
    results = []
    for inputs in (wide, close):
        leaves = dataclasses.replace(inputs, **{name: getattr(inputs, name).detach().requires_grad_() for name in "qkv"})
        out = call(leaves)
        results.append([out, *torch.autograd.grad(out, [leaves.q, leaves.k, leaves.v], d_out)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    _, vectors, tables = qk_inputs(torch.bfloat16, 1)
    where = {"grid": GRID, "special_tokens": 5, "backend": "triton"}
    with torch.no_grad():
        found, expected = (qk_norm_rope(x, *vectors, *tables, **where) for x in (qkv, qkv.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    spread = buffer.as_strided((1, 2, 893, 256), (0, 893 * stride, stride, 1))
    spread.copy_(torch.randn(spread.shape, dtype=torch.bfloat16, device="cuda"))
    shapes = [(256, 1, 3, 3), (256,), (64, 256, 1, 1), (64,), (1, 64, 1, 1), (1,)]
    parameters = [torch.randn(shape, device="cuda") * 0.1 for shape in shapes]
    found, expected = (mask_head(x, *parameters, **where) for x in (spread, spread.contiguous()))
    assert torch.equal(found, expected)


def test_more_than_two_to_the_31_elements_and_65535_heads():
    """B H N D past 2^31 and B H past 65 535: the last batch entry is computed and stored where it belongs."""
    batch, heads, tokens = 4200, 16, 512
    assert batch * heads * tokens * 64 > 1 << 31 and batch * heads > 65535
    q, k, v = (torch.randn(batch, heads, tokens, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out = mask_attention(q, k, v, backend="triton")
    for i in (0, batch // 2, batch - 1):
        exact = torch.nn.functional.scaled_dot_product_attention(*(x[i].float() for x in (q, k, v)))
        assert torch.allclose(out[i].float(), exact, atol=1e-2)


def test_cuda_graph():
    """Forward and backward of all four ops in one graph: no synchronisation, no allocation that a pool cannot serve."""
    tokens, head = mask_head_inputs(torch.bfloat16)
    qkv, vectors, tables = qk_inputs(torch.bfloat16)
    layout = frames(4)
    gate = layout.only_special(torch.full((1, layout.tokens), 64.0, device="cuda"))
    residual = residual_inputs()
    leaves = [*head, qkv, *vectors, *residual]

    def step():
        bias = mask_head(tokens, *head, grid=GRID, special_tokens=5, backend="triton")
        q, k, v = qk_norm_rope(qkv, *vectors, *tables, grid=GRID, special_tokens=5, backend="triton")
        out = mask_attention(q, k, v, gate, bias, layout=layout, backend="triton")
        total, normal = residual_norm(*residual, backend="triton")
        roots = [out.float().square().mean(), total.square().mean() + normal.mean()]
        return [out.detach(), total.detach(), normal.detach(), *torch.autograd.grad(roots, leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        qkv.copy_(torch.randn_like(qkv))
        tokens.copy_(torch.randn_like(tokens))
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


def test_compiled_and_checkpointed_block():
    """torch.compile(fullgraph=True) of projection, QK-norm + RoPE, mask and attention, and the same block under checkpointing."""
    tokens, head = mask_head_inputs(torch.bfloat16)
    _, vectors, tables = qk_inputs(torch.bfloat16)
    layout = frames(4)
    gate = layout.only_special(torch.full((1, layout.tokens), 64.0, device="cuda"))
    weight = (torch.randn(3 * 1024, 1024, device="cuda") / 32).to(torch.bfloat16).requires_grad_()

    def block(x, weight):
        bias = mask_head(x, *head, grid=GRID, special_tokens=5, backend="triton")
        qkv = torch.nn.functional.linear(x.flatten(1, 2), weight).unflatten(-1, (3, 16, 64))
        q, k, v = qk_norm_rope(qkv, *vectors, *tables, grid=GRID, special_tokens=5, backend="triton")
        return mask_attention(q, k, v, gate, bias, layout=layout, backend="triton")

    def results(function):
        out = function(tokens, weight)
        return [out, *torch.autograd.grad(out.float().square().mean(), [weight, *head])]

    expected = results(block)
    checkpointed = results(lambda *x: torch.utils.checkpoint.checkpoint(block, *x, use_reentrant=False))
    assert all(torch.equal(x, y) for x, y in zip(checkpointed, expected, strict=True))
    for x, y in zip(results(torch.compile(block, fullgraph=True)), expected, strict=True):
        assert (x.float() - y.float()).norm() <= 2e-2 * y.float().norm()


def test_full_autotune(monkeypatch, tmp_path):
    """Every candidate runs, the choice is written down, and the result stays within the rounding of another order of sums."""
    from page4d_kernels.triton import autotune

    inputs = attention_inputs(frames(4), dtype=torch.bfloat16, packed=True, device="cuda")
    expected = call(inputs)
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setenv("PAGE4D_AUTOTUNE", "full")
    monkeypatch.setenv("PAGE4D_AUTOTUNE_TABLE", str(tmp_path / "table.json"))
    assert (call(inputs) - expected).abs().max() < 2e-2
    assert "mask_attention.forward" in (tmp_path / "table.json").read_text()


SANITIZED = """
import torch
from page4d_kernels import TokenLayout, mask_attention
from page4d_kernels.testing import attention_gradients, attention_inputs
for promise in (True, False):
    inputs = attention_inputs(TokenLayout(3, 59, 5), dtype=torch.bfloat16, packed=True, device="cuda").requires_grad_()
    out = mask_attention(*inputs.tensors(), layout=inputs.layout if promise else None, backend="triton")
    attention_gradients(out, inputs, torch.randn_like(out))
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "finished" in result.stdout, (result.stdout + result.stderr)[-4000:]
