from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from page4d_kernels import qk_norm_rope, rope_tables
from page4d_kernels.backends.qk_norm_rope import BACKENDS
from page4d_kernels.backends.qk_norm_rope.problem import QkNormRopeProblem
from page4d_kernels.testing import assert_within_budget, default_device

NAMES = [backend.name for backend in BACKENDS if not backend.unavailable()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GRIDS = [((3, 4), 5, 2, 1), ((1, 1), 1, 1, 2), ((5, 2), 0, 3, 1), ((7, 13), 5, 1, 1)]  # grid, special tokens, frames, batch


def make(grid, special, frames, batch, head_dim=64, dtype=torch.float32, device="cpu", heads=2):
    generator = torch.Generator().manual_seed(0)
    tokens = frames * (special + grid[0] * grid[1])
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator)
    parameters = [torch.randn(head_dim, generator=generator) for _ in range(4)]
    cos, sin = rope_tables(grid, head_dim, device=device)
    return [qkv.to(device, dtype), *(p.to(device, dtype) for p in parameters), cos, sin], {"grid": grid, "special_tokens": special}


def served(backend, device="cpu", head_dim=64):
    """The dtypes that a backend takes; none of them is skipped by mistake, as every backend takes float32 and a head dim of 64."""
    problems = {dtype: QkNormRopeProblem(device, dtype, 1, 17, 2, head_dim, (3, 4), 5) for dtype in DTYPES}
    found = [dtype for dtype, problem in problems.items() if not BACKENDS.reasons(backend, problem)]
    if not found and head_dim != 64:
        pytest.skip("; ".join(BACKENDS.reasons(backend, problems[torch.float32])))
    assert torch.float32 in found
    return found


def by_hand(x, weight, bias, grid, special, frames):
    """LayerNorm by torch, then each pair of channels turned by its own 2 x 2 rotation, token by token. (B, N, H, D) -> (B, H, N, D)."""
    x = F.layer_norm(x, x.shape[-1:], weight, bias)
    head_dim = x.shape[-1]
    half, quarter = head_dim // 2, head_dim // 4
    out = x.clone()
    per_frame = special + grid[0] * grid[1]
    for token in range(per_frame * frames):
        patch = token % per_frame - special
        y_x = (0, 0) if patch < 0 else (patch // grid[1] + 1, patch % grid[1] + 1)
        for axis, position in enumerate(y_x):
            for m in range(quarter):
                angle = position * 100.0 ** (-2 * m / half)
                i, j = axis * half + m, axis * half + quarter + m
                a, b = x[:, token, :, i], x[:, token, :, j]
                out[:, token, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[:, token, :, j] = b * math.cos(angle) + a * math.sin(angle)
    return out.transpose(1, 2)


@pytest.mark.parametrize("head_dim", [16, 40, 64, 128])
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_forward_against_rotations_by_hand(backend, shape, head_dim, device, poisoned_empty):
    grid, special, frames, _ = shape
    for dtype in served(backend, device, head_dim):
        tensors, where = make(*shape, head_dim, dtype, device)
        q, k, v = qk_norm_rope(*tensors, **where, backend=backend)
        exact = [x.double() for x in tensors]
        for i, out in enumerate((q, k)):
            oracle = by_hand(exact[0][:, :, i], exact[1 + 2 * i], exact[2 + 2 * i], grid, special, frames)
            plain = by_hand(tensors[0][:, :, i], tensors[1 + 2 * i], tensors[2 + 2 * i], grid, special, frames)
            tables = 1e-6 * float(oracle.abs().max()) * max(grid)  # the tables' angles are formed in fp32, as the released model's are
            assert_within_budget("qk"[i], out, oracle, plain, slack=tables)
        assert torch.equal(v, tensors[0][:, :, 2].transpose(1, 2))
        assert v.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()


def test_gradients(backend, poisoned_empty):
    if torch.float64 not in served(backend, default_device(backend)):
        pytest.skip("it has no float64: see the test against the reference")
    tensors, where = make((3, 4), 5, 2, 2, 16, torch.float64)
    leaves = [x.requires_grad_() for x in tensors[:5]]

    def function(*leaves):
        return qk_norm_rope(*leaves, *tensors[5:], **where, backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_gradients_against_the_reference_in_float64(backend, shape, device, poisoned_empty):
    for dtype in served(backend, device):
        tensors, where = make(*shape, 64, dtype, device)
        exact = [x.double().requires_grad_() for x in tensors[:5]]
        leaves = [x.requires_grad_() for x in tensors[:5]]
        upstream = [torch.randn(x.shape, dtype=torch.float64).to(device) for x in qk_norm_rope(*tensors, **where, backend="reference")]
        oracle = torch.autograd.grad(qk_norm_rope(*exact, *tensors[5:], **where, backend="reference"), exact, upstream)
        found = qk_norm_rope(*leaves, *tensors[5:], **where, backend=backend)
        gradients = torch.autograd.grad(found, leaves, [x.to(dtype) for x in upstream])
        tolerance = 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5  # of the largest value
        for gradient, expected in zip(gradients, oracle, strict=True):
            assert gradient.dtype == dtype
            assert (gradient.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_strided_projection(backend):
    """A projection whose rows are longer than 3HD: the first part of a wider buffer."""
    tensors, where = make((3, 4), 5, 2, 2, device=default_device(backend))
    wide = torch.cat([tensors[0].flatten(2), torch.zeros(2, 34, 10, device=default_device(backend))], -1)
    view = wide[:, :, : 3 * 2 * 64].unflatten(-1, (3, 2, 64))
    assert not view.is_contiguous()
    for x, y in zip(
        qk_norm_rope(view, *tensors[1:], **where, backend=backend), qk_norm_rope(*tensors, **where, backend=backend), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", [name for name in NAMES if default_device(name) == "cuda"])
def test_on_a_device_that_is_not_the_current_one(backend):
    tensors, options = make((3, 4), 5, 2, 1, device="cuda:1")
    with torch.cuda.device(0):
        q, k, _ = qk_norm_rope(*tensors, **options, backend=backend)
        assert torch.cuda.current_device() == 0
        assert float(torch.ones(1, device="cuda") + 1) == 2  # the current device still works
    on_cpu, options = make((3, 4), 5, 2, 1)
    for found, wanted in zip((q, k), qk_norm_rope(*on_cpu, **options, backend="reference")[:2], strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_opcheck(backend):
    tensors, _ = make((3, 4), 5, 2, 2, 32, device=default_device(backend))
    leaves = [x.requires_grad_() for x in tensors[:5]]
    torch.library.opcheck(torch.ops.page4d.qk_norm_rope.default, (*leaves, *tensors[5:], [3, 4], 5, 1e-5, backend))


@pytest.mark.slow
def test_compiles_without_graph_break(backend):
    tensors, where = make((3, 4), 5, 2, 2, device=default_device(backend))
    compiled = torch.compile(lambda *x: qk_norm_rope(*x, **where, backend=backend), fullgraph=True)
    for x, y in zip(compiled(*tensors), qk_norm_rope(*tensors, **where, backend=backend), strict=True):
        assert torch.allclose(x, y)
