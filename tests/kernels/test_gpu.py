"""Our GPU kernels, Triton and CUDA, at real sizes: long sequences, races, 64-bit offsets, CUDA graphs, compute-sanitizer.

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

from page4d_kernels import (
    TokenLayout,
    frame_attention,
    mask_attention,
    mask_head,
    qk_norm_rope,
    registries,
    residual_norm,
    rope_tables,
    select_keys,
    thin_attention,
)
from page4d_kernels.testing import (
    assert_within_budget,
    attention_gradients,
    attention_inputs,
    gradient_slack,
    oracle_attention,
    plain_attention,
)

pytest.importorskip("triton")
# a kernel that hangs blocks the main thread, where no signal is handled: a thread ends the process
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120, method="thread")]

GRID = (24, 37)
FRAME = TokenLayout(1, 893, 5)
HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32]


def frames(count: int) -> TokenLayout:
    return dataclasses.replace(FRAME, frames=count)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    """A backend of attention, mask head and QK-norm + RoPE."""
    for op in ("mask_attention", "mask_head", "qk_norm_rope"):
        reasons = registries()[op].get(request.param).unavailable()
        if reasons:
            pytest.skip(f"{op}: {'; '.join(reasons)}")
    return request.param


def some_rows(layout: TokenLayout) -> torch.Tensor:
    """All gated rows, and 512 others, the last one among them."""
    rows = torch.arange(layout.tokens)
    gated = rows % layout.tokens_per_frame < layout.special_tokens
    others = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(0))[:511]
    return torch.cat([rows[gated], others, rows[-1:]]).unique().cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("promise", [True, False], ids=["layout", "no layout"])
@pytest.mark.parametrize("count", [10, 45])
def test_long_forward(backend, count, promise, dtype):
    """8 930 and 40 185 tokens, out of a packed projection, against float64."""
    inputs = attention_inputs(frames(count), dtype=dtype, packed=True, device="cuda")
    if inputs.reasons(backend):
        return
    out = (inputs if promise else dataclasses.replace(inputs, layout=None)).attend(backend)
    rows = some_rows(inputs.layout)
    sample = dataclasses.replace(inputs, q=inputs.q[:, :, rows], query_gate=inputs.query_gate[:, rows], layout=None)
    oracle, _ = oracle_attention(sample, 0.125)
    assert_within_budget("out", out[:, :, rows], oracle, plain_attention(sample, 0.125))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [4, 10])
def test_long_gradients(backend, count, dtype):
    """3 572 and 8 930 tokens: all gradients against float64."""
    inputs = attention_inputs(frames(count), heads=1, dtype=dtype, packed=True, device="cuda").requires_grad_()
    if inputs.reasons(backend):
        return
    d_out = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    exact = inputs.to(torch.float64).requires_grad_()
    out, lse = oracle_attention(exact, 0.125)
    oracle = attention_gradients(out, exact, d_out)
    slack = gradient_slack(exact, out, lse, d_out, 0.125)
    low = inputs.to(dtype).requires_grad_()
    plain = attention_gradients(plain_attention(low, 0.125), low, d_out)
    for name, gradient in attention_gradients(inputs.attend(backend), inputs, d_out).items():
        if name == "query_gate":
            special = inputs.layout.only_special(torch.ones_like(gradient)).bool()
            oracle[name], plain[name] = oracle[name].where(special, 0.0), plain[name].where(special, 0.0)
        assert_within_budget(name, gradient, oracle[name], plain[name], 2.0, slack[name])


@pytest.mark.parametrize("name", ["triton", "cuda", "sdpa"])
def test_layers_of_attention_plans(name):
    """14 288 tokens with cells of 2 x 2 and within frames, against `chunked` in fp32."""
    if registries()["mask_attention"].get(name).unavailable():
        pytest.skip("the backend is missing")
    layout = frames(16)
    inputs = attention_inputs(layout, heads=2, dtype=torch.bfloat16, packed=True, device="cuda")
    exact = inputs.to(torch.float32)
    kept = select_keys(layout, GRID, (2, 2), device=inputs.q.device)
    rows = torch.arange(5, 893, 13, device="cuda")
    for attend, of in ((thin_attention, kept), (frame_attention, layout)):
        found = attend(*inputs.tensors()[:3], of, *inputs.tensors()[3:], backend=name, dense_rows=rows)
        expected = attend(*exact.tensors()[:3], of, *exact.tensors()[3:], backend="chunked", dense_rows=rows)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.float() - theirs).norm() / theirs.norm() < 1e-2
        again = attend(*inputs.tensors()[:3], of, *inputs.tensors()[3:], backend=name, dense_rows=rows)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_gradients_at_40k_tokens(backend):
    """Against the chunked backend in fp32, which holds no N x N either. The gradients agree to the rounding of bf16.

    dr_i weighs dS, whose rows sum to 0, with biases of either sign: the output's rounding (in delta) weighs more there.
    """
    inputs = attention_inputs(frames(45), heads=1, dtype=torch.bfloat16, packed=True, device="cuda").requires_grad_()
    exact = inputs.to(torch.float32).requires_grad_()
    d_out = torch.randn_like(inputs.q)
    expected = attention_gradients(mask_attention(*exact.tensors(), layout=exact.layout, backend="chunked"), exact, d_out)
    for name, gradient in attention_gradients(inputs.attend(backend), inputs, d_out).items():
        error = (gradient.float() - expected[name]).norm() / expected[name].norm()
        assert error < (1e-1 if name == "query_gate" else 2e-2), f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_200_repeats_are_bit_equal(backend, dtype):
    inputs = attention_inputs(frames(4), heads=8, dtype=dtype, packed=True, device="cuda").requires_grad_()
    d_out = torch.randn_like(inputs.q)

    def once():
        out = inputs.attend(backend)
        return [out.detach(), *attention_gradients(out, inputs, d_out).values()]

    first = once()
    for repeat in range(200):
        assert all(torch.equal(x, y) for x, y in zip(once(), first, strict=True)), f"repeat {repeat} differs"


def test_200_repeats_of_the_other_ops_are_bit_equal(backend):
    tokens, parameters = mask_head_inputs(torch.bfloat16)
    qkv, vectors, tables = qk_inputs(torch.bfloat16)
    residual = residual_inputs()

    def once():
        bias = mask_head(tokens, *parameters, grid=GRID, special_tokens=5, backend=backend)
        q, k, _ = qk_norm_rope(qkv, *vectors, *tables, grid=GRID, special_tokens=5, backend=backend)
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
def test_mask_head_at_the_official_size(backend, dtype):
    """1024 channels, 256 hidden, 24 x 37 patches. The head in float64 is the oracle, in its own dtype the budget."""
    tokens, parameters = mask_head_inputs(dtype)
    parameters = [p.detach().to(dtype).requires_grad_() for p in parameters]
    d_out = torch.randn(1, 4 * 893, device="cuda")

    def results(dtype, backend):
        leaves = [p.detach().to(dtype).requires_grad_() for p in parameters]
        bias = mask_head(tokens.to(dtype), *leaves, grid=GRID, special_tokens=5, backend=backend)
        return [bias, *torch.autograd.grad(bias, leaves, d_out.to(bias.dtype))]

    names = ("bias", "w0", "b0", "w2", "b2", "w4", "b4")
    for name, found, exact in zip(names, results(dtype, backend), results(torch.float64, "reference"), strict=True):
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]  # tf32 matmuls; gradients rounded to dtype
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max(), name


def test_offsets_past_two_to_the_31_in_strides(backend):
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
        out = leaves.attend(backend)
        results.append([out, *torch.autograd.grad(out, [leaves.q, leaves.k, leaves.v], d_out)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    _, vectors, tables = qk_inputs(torch.bfloat16, 1)
    where = {"grid": GRID, "special_tokens": 5, "backend": backend}
    with torch.no_grad():
        found, expected = (qk_norm_rope(x, *vectors, *tables, **where) for x in (qkv, qkv.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    spread = buffer.as_strided((1, 2, 893, 256), (0, 893 * stride, stride, 1))
    spread.copy_(torch.randn(spread.shape, dtype=torch.bfloat16, device="cuda"))
    shapes = [(256, 1, 3, 3), (256,), (64, 256, 1, 1), (64,), (1, 64, 1, 1), (1,)]
    parameters = [torch.randn(shape, device="cuda") * 0.1 for shape in shapes]
    found, expected = (mask_head(x, *parameters, **where) for x in (spread, spread.contiguous()))
    assert torch.equal(found, expected)


def test_more_than_two_to_the_31_elements_and_65535_heads(backend):
    """B H N D past 2^31 and B H past 65 535: the last batch entry is computed and stored where it belongs."""
    batch, heads, tokens = 4200, 16, 512
    assert batch * heads * tokens * 64 > 1 << 31 and batch * heads > 65535
    q, k, v = (torch.randn(batch, heads, tokens, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out = mask_attention(q, k, v, backend=backend)
    for i in (0, batch // 2, batch - 1):
        exact = torch.nn.functional.scaled_dot_product_attention(*(x[i].float() for x in (q, k, v)))
        assert torch.allclose(out[i].float(), exact, atol=1e-2)


def test_cuda_graph(backend):
    """Forward and backward of all four ops in one graph: no synchronisation, no allocation that a pool cannot serve."""
    tokens, head = mask_head_inputs(torch.bfloat16)
    qkv, vectors, tables = qk_inputs(torch.bfloat16)
    layout = frames(4)
    gate = layout.only_special(torch.full((1, layout.tokens), 64.0, device="cuda"))
    residual = residual_inputs()
    leaves = [*head, qkv, *vectors, *residual]

    def step():
        bias = mask_head(tokens, *head, grid=GRID, special_tokens=5, backend=backend)
        q, k, v = qk_norm_rope(qkv, *vectors, *tables, grid=GRID, special_tokens=5, backend=backend)
        out = mask_attention(q, k, v, gate, bias, layout=layout, backend=backend)
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


def test_compiled_and_checkpointed_block(backend):
    """torch.compile(fullgraph=True) of projection, QK-norm + RoPE, mask and attention, and the same block under checkpointing."""
    tokens, head = mask_head_inputs(torch.bfloat16)
    _, vectors, tables = qk_inputs(torch.bfloat16)
    layout = frames(4)
    gate = layout.only_special(torch.full((1, layout.tokens), 64.0, device="cuda"))
    weight = (torch.randn(3 * 1024, 1024, device="cuda") / 32).to(torch.bfloat16).requires_grad_()

    def block(x, weight):
        bias = mask_head(x, *head, grid=GRID, special_tokens=5, backend=backend)
        qkv = torch.nn.functional.linear(x.flatten(1, 2), weight).unflatten(-1, (3, 16, 64))
        q, k, v = qk_norm_rope(qkv, *vectors, *tables, grid=GRID, special_tokens=5, backend=backend)
        return mask_attention(q, k, v, gate, bias, layout=layout, backend=backend)

    def results(function):
        out = function(tokens, weight)
        return [out, *torch.autograd.grad(out.float().square().mean(), [weight, *head])]

    expected = results(block)
    checkpointed = results(lambda *x: torch.utils.checkpoint.checkpoint(block, *x, use_reentrant=False))
    assert all(torch.equal(x, y) for x, y in zip(checkpointed, expected, strict=True))
    for x, y in zip(results(torch.compile(block, fullgraph=True)), expected, strict=True):
        assert (x.float() - y.float()).norm() <= 2e-2 * y.float().norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(backend):
    """Tensors on cuda:1 while cuda:0 is current, forward and backward, after the same call on cuda:0."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        inputs = attention_inputs(frames(2), dtype=torch.bfloat16, packed=True, device=device).requires_grad_()
        out = inputs.attend(backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs.tensors())])
        assert torch.cuda.current_device() == 0
    for first, second in zip(*results, strict=True):
        assert second.device.index == 1 and torch.equal(first, second.to(first.device))


def test_repeated_launches_see_new_tensors():
    """Launches are remembered by sizes, dtypes and alignments: other addresses, aligned or not, give the results of a first launch."""
    inputs = attention_inputs(frames(2), dtype=torch.bfloat16, device="cuda")
    expected = inputs.attend("triton")
    memory = torch.zeros(inputs.q.numel() + 16, dtype=torch.bfloat16, device="cuda")
    for offset in (0, 8, 1, 3, 8, 0):
        q = memory[offset : offset + inputs.q.numel()].view_as(inputs.q).copy_(inputs.q)
        assert (dataclasses.replace(inputs, q=q).attend("triton") - expected).abs().max() < 2e-2


def test_full_autotune(monkeypatch, tmp_path):
    """Every candidate runs, the choice is written down, and the result stays within the rounding of another order of sums."""
    from page4d_kernels.triton import autotune

    inputs = attention_inputs(frames(4), dtype=torch.bfloat16, packed=True, device="cuda")
    expected = inputs.attend("triton")
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setenv("PAGE4D_AUTOTUNE", "full")
    monkeypatch.setenv("PAGE4D_AUTOTUNE_TABLE", str(tmp_path / "table.json"))
    assert (inputs.attend("triton") - expected).abs().max() < 2e-2
    assert "mask_attention_fwd_kernel" in (tmp_path / "table.json").read_text()


def test_few_queries_and_the_log_sum_exp(backend):
    """40 queries against 8 930 keys: the keys are split over blocks, and partial results of two halves merge into the whole."""
    inputs = attention_inputs(frames(10), heads=4, dtype=torch.bfloat16, packed=True, device="cuda")
    few = dataclasses.replace(inputs, q=inputs.q[:, :, :40], query_gate=inputs.query_gate[:, :40], layout=None)
    oracle, oracle_lse = oracle_attention(few, 0.125)
    out, lse = few.attend(backend, return_lse=True)
    assert_within_budget("out", out, oracle, plain_attention(few, 0.125))
    assert (lse - oracle_lse).abs().max() < 1e-3
    halves = [
        mask_attention(few.q, few.k[:, :, keys], few.v[:, :, keys], few.query_gate, few.key_bias[:, keys], backend=backend, return_lse=True)
        for keys in (slice(0, 4000), slice(4000, None))
    ]
    weights = torch.stack([lse for _, lse in halves]).softmax(0).unsqueeze(-1)
    merged = (torch.stack([out.float() for out, _ in halves]) * weights).sum(0)
    assert_within_budget("merged", merged.to(torch.bfloat16), oracle, plain_attention(few, 0.125))


def test_row_without_finite_logit_is_zero_and_nan_stays_in_its_row(backend):
    inputs = attention_inputs(TokenLayout(3, 59, 5), dtype=torch.bfloat16, device="cuda")
    inputs.q[..., 0], inputs.k[..., 0] = 0, -1e30
    inputs.q[:, :, 7] = 0
    inputs.q[:, :, 7, 0] = 1e30
    inputs.q[:, :, 20, 3] = torch.nan
    out, lse = inputs.attend(backend, return_lse=True)
    assert not out[:, :, 7].any() and (lse[:, :, 7] == -torch.inf).all()
    assert out[:, :, 20].isnan().all()
    assert out.isnan().any(-1).sum() == inputs.q.shape[1]


def test_opcheck(backend):
    inputs = attention_inputs(TokenLayout(2, 11, 3), batch=2, dtype=torch.bfloat16, device="cuda").requires_grad_()
    for layout in ([2, 11, 3], None):
        torch.library.opcheck(torch.ops.page4d.mask_attention.default, (*inputs.tensors(), layout, 0.125, backend))


SANITIZED = """
import torch
from page4d_kernels import TokenLayout, mask_attention, mask_head, qk_norm_rope, rope_tables
from page4d_kernels.testing import attention_gradients, attention_inputs
for promise in (True, False):
    inputs = attention_inputs(TokenLayout(3, 59, 5), dtype=torch.bfloat16, packed=True, device="cuda").requires_grad_()
    out = mask_attention(*inputs.tensors(), layout=inputs.layout if promise else None, backend="BACKEND")
    attention_gradients(out, inputs, torch.randn_like(out))
few = attention_inputs(TokenLayout(1, 1200, 5), dtype=torch.bfloat16, device="cuda")
mask_attention(few.q[:, :, :40], few.k, few.v, backend="BACKEND")
where = {"grid": (6, 9), "special_tokens": 5, "backend": "BACKEND"}
tokens, shapes = torch.randn(1, 2, 59, 72, device="cuda"), [(72, 1, 3, 3), (72,), (48, 72, 1, 1), (48,), (1, 48, 1, 1), (1,)]
mask_head(tokens, *(torch.randn(shape, device="cuda") for shape in shapes), **where)
vectors, tables = [torch.randn(64, device="cuda") for _ in range(4)], rope_tables((6, 9), 64, device="cuda")
qk_norm_rope(torch.randn(1, 118, 3, 2, 64, device="cuda"), *vectors, *tables, **where)
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.slow
@pytest.mark.timeout(400, method="thread")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(backend, tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED.replace("BACKEND", backend)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "finished" in result.stdout, (result.stdout + result.stderr)[-4000:]
