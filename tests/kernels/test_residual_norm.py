from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from page4d_kernels import BackendError, residual_norm
from page4d_kernels.backends.residual_norm import BACKENDS
from page4d_kernels.backends.residual_norm.problem import ResidualNormProblem
from page4d_kernels.qualify.classes import part_of
from page4d_kernels.qualify.trial import Draw, Setting, settings
from page4d_kernels.qualify.trials.residual_norm import trials
from page4d_kernels.testing import assert_within_budget, default_device

NAMES = [backend.name for backend in BACKENDS if not backend.unavailable()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (7, 24), (3, 5, 100), (2, 11, 1024), (33, 64)]


def make(shape, dtype=torch.float32, device="cpu", branch=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) * 3 + 1, torch.randn(shape, generator=generator)]
    tensors += [torch.randn(shape[-1], generator=generator) for _ in range(3)]
    return [x.to(device, branch if i == 1 and branch else dtype) for i, x in enumerate(tensors)]


def composed(x, branch, scale, weight, bias, eps=1e-5):
    total = x + scale * branch
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def served(backend, device="cpu"):
    found = [dtype for dtype in DTYPES if not BACKENDS.reasons(backend, ResidualNormProblem(device, dtype, 7, 24))]
    assert torch.float32 in found
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(backend, shape, device, poisoned_empty):
    for dtype in served(backend, device):
        tensors = make(shape, dtype, device)
        oracle = composed(*(x.double() for x in tensors))
        found = residual_norm(*tensors, backend=backend)
        for name, out, exact, plain in zip(("total", "normal"), found, oracle, composed(*tensors), strict=True):
            assert out.dtype == dtype and out.is_contiguous()
            assert_within_budget(name, out, exact, plain)


def test_mixed_types_and_another_eps(backend):
    """As in the trunk: the stream in fp32, the branch and what reads the norm in half precision."""
    tensors = make((9, 24), branch=torch.float16, device=default_device(backend))
    total, normal = residual_norm(*tensors, eps=0.5, dtype=torch.float16, backend=backend)
    exact = composed(*(x.double() for x in tensors), eps=0.5)
    assert total.dtype == torch.float32 and normal.dtype == torch.float16
    assert (total - exact[0]).abs().max() < 1e-5 and (normal - exact[1]).abs().max() < 4e-3


def test_gradcheck(backend):
    if torch.float64 not in served(backend, default_device(backend)):
        pytest.skip("it has no float64: see the test against the reference")
    leaves = [x.requires_grad_() for x in make((2, 3, 8), torch.float64, default_device(backend))]
    assert torch.autograd.gradcheck(lambda *x: residual_norm(*x, backend=backend), leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_against_float64(backend, shape, device, poisoned_empty):
    for dtype in served(backend, device):
        tensors = make(shape, dtype, device)
        upstream = [x.to(dtype) for x in make(shape, torch.float64, device, seed=1)[:2]]
        exact = [x.double().requires_grad_() for x in tensors]
        oracle = torch.autograd.grad(composed(*exact), exact, [x.double() for x in upstream])
        leaves = [x.requires_grad_() for x in tensors]
        gradients = torch.autograd.grad(residual_norm(*leaves, backend=backend), leaves, upstream)
        tolerance = 8 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5  # of the largest value
        for gradient, expected in zip(gradients, oracle, strict=True):
            assert gradient.dtype == dtype
            assert (gradient.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_many_rows_are_summed_by_several_programs(backend):
    """More tiles than the backward kernel has programs, so that some sum over several and the last over fewer."""
    tensors = make((1, 16 * 512 + 5, 8), device=default_device(backend))
    leaves = [x.requires_grad_() for x in tensors]
    upstream = make((1, 16 * 512 + 5, 8), device=default_device(backend), seed=1)[:2]
    found = torch.autograd.grad(residual_norm(*leaves, backend=backend), leaves, upstream)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    for gradient, expected in zip(found, torch.autograd.grad(composed(*exact), exact, [x.double() for x in upstream]), strict=True):
        assert (gradient.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_only_one_output_is_used(backend):
    for index in (0, 1):
        tensors = [x.requires_grad_() for x in make((5, 24), device=default_device(backend))]
        found = torch.autograd.grad(residual_norm(*tensors, backend=backend)[index].square().sum(), tensors, allow_unused=True)
        expected = torch.autograd.grad(composed(*tensors)[index].square().sum(), tensors, allow_unused=True)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=1e-4, atol=1e-4)


def test_strided(backend):
    x, branch, *vectors = make((6, 10, 24), device=default_device(backend))
    views = [tensor[:, 2:7].transpose(0, 1) for tensor in (x, branch)]
    leaves = [view.detach().requires_grad_() for view in views]
    assert not leaves[0].is_contiguous()
    found = residual_norm(*leaves, *vectors, backend=backend)
    expected = residual_norm(*(view.contiguous() for view in views), *vectors, backend=backend)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, expected, strict=True))
    upstream = torch.randn(10, 6, 5, device=default_device(backend)).transpose(0, 2)[..., :1].expand(5, 6, 24)  # strides 0 too
    a, b = (torch.autograd.grad(residual_norm(*leaves, *vectors, backend=backend)[1], leaves, d) for d in (upstream, upstream.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_float64_anywhere_is_not_for_triton():
    if "triton" not in NAMES or default_device("triton") == "cuda":
        pytest.skip("needs the interpreter")
    for tensors, dtype in ((make((2, 8), branch=torch.float64), None), (make((2, 8)), torch.float64)):
        with pytest.raises(BackendError, match="not float64"):
            residual_norm(*tensors, dtype=dtype, backend="triton")


def test_too_many_channels_for_triton():
    if "triton" not in NAMES or default_device("triton") == "cuda":
        pytest.skip("needs the interpreter")
    with pytest.raises(BackendError, match="up to 4096 channels, not 4097"):
        residual_norm(*make((1, 4097)), backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({1: torch.zeros(2, 9)}, ValueError, r"branch must have the shape of x, \(2, 8\), not \(2, 9\)"),
        ({2: torch.zeros(7)}, ValueError, r"scale must have shape \(8,\), as x has channels, not \(7,\)"),
        ({3: torch.zeros(1, 8)}, ValueError, "weight must have shape"),
        ({0: torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "takes float32, float16, bfloat16, float64, not int64"),
        ({0: torch.zeros(0, 8), 1: torch.zeros(0, 8)}, ValueError, "not empty"),
        ({4: torch.zeros(8, device="meta")}, ValueError, "bias is on meta but x is on cpu"),
        ({4: None}, TypeError, "bias must be a tensor, not NoneType"),
    ],
)
def test_mistakes(change, error, message):
    tensors = [change.get(i, x) for i, x in enumerate(make((2, 8)))]
    with pytest.raises(error, match=message):
        residual_norm(*tensors)


def test_an_output_type_that_is_none():
    with pytest.raises(TypeError, match=r"not torch\.int8"):
        residual_norm(*make((2, 8)), dtype=torch.int8)


def test_opcheck(backend):
    leaves = [x.requires_grad_() for x in make((3, 5, 24), device=default_device(backend))]
    torch.library.opcheck(torch.ops.page4d.residual_norm.default, (*leaves, 1e-5, torch.float32, backend))


def test_autocast_does_not_reach_inside():
    tensors = make((5, 24))
    with torch.autocast("cpu", torch.bfloat16):
        found = residual_norm(*tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, residual_norm(*tensors), strict=True))


@pytest.mark.slow
def test_compiles_without_graph_break(backend):
    tensors = make((3, 5, 24), device=default_device(backend))
    compiled = torch.compile(lambda *x: residual_norm(*x, backend=backend), fullgraph=True)
    for x, y in zip(compiled(*tensors), residual_norm(*tensors, backend=backend), strict=True):
        torch.testing.assert_close(x, y)


def test_qualification_tells_dtypes_of_the_branch_apart():
    """The stream is fp32 in both cases. What passes for a branch in bf16 has shown nothing for one in fp32."""
    parts = {dtype: part_of(ResidualNormProblem("cpu", torch.float32, 7, 24, branch=dtype)) for dtype in (torch.float32, torch.bfloat16)}
    assert parts == {torch.float32: "float32 forward, float32 branch", torch.bfloat16: "float32 forward, bfloat16 branch"}
    assert list(settings("residual_norm", "cpu", ["bfloat16"], ["forward"], [64])) == ["bfloat16 forward, bfloat16 branch"]
    found = {part_of(trial.problem) for trial in trials(Setting("cpu", torch.bfloat16), Draw(random.Random(0)))}
    assert found == {"bfloat16 forward, bfloat16 branch", "float32 forward, bfloat16 branch"}
