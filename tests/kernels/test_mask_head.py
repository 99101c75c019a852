from __future__ import annotations

import pytest
import torch
from torch import nn

from page4d_kernels import mask_head
from page4d_kernels.backends.mask_head import BACKENDS
from page4d_kernels.backends.mask_head.problem import MaskHeadProblem
from page4d_kernels.testing import assert_within_budget, default_device

NAMES = [backend.name for backend in BACKENDS if not backend.unavailable()]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 2, (3, 4), 5), (2, 1, (1, 2), 0), (1, 3, (6, 5), 5), (2, 2, (1, 7), 1)]  # batch, frames, grid, special tokens


def make(batch, frames, grid, special, channels=24, hidden=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    per_frame = special + grid[0] * grid[1]
    tokens = torch.randn(batch, frames, per_frame, channels, generator=generator) * 3 + 1
    shapes = [(channels, 1, 3, 3), (channels,), (hidden, channels, 1, 1), (hidden,), (1, hidden, 1, 1), (1,)]
    parameters = [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]
    return tokens.to(device, dtype), [p.to(device, dtype) for p in parameters], {"grid": grid, "special_tokens": special}


def served(backend, device="cpu"):
    """The dtypes that a backend takes; none is skipped by mistake, as every backend takes float32."""
    problems = {dtype: MaskHeadProblem(device, dtype, 1, 1, (3, 4), 5, 24, 16) for dtype in DTYPES}
    found = [dtype for dtype, problem in problems.items() if not BACKENDS.reasons(backend, problem)]
    assert torch.float32 in found
    return found


def by_modules(tokens, parameters, grid, special_tokens):
    """torch modules, one frame at a time."""
    channels, hidden = tokens.shape[-1], parameters[2].shape[0]
    head = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.GELU(),
        nn.Conv2d(channels, hidden, 1),
        nn.GELU(),
        nn.Conv2d(hidden, 1, 1),
    ).to(tokens.dtype)
    head.load_state_dict(dict(zip(head.state_dict(), parameters, strict=True)))
    bias = torch.zeros(tokens.shape[:3], dtype=tokens.dtype)
    for b in range(tokens.shape[0]):
        for s in range(tokens.shape[1]):
            patches = tokens[b, s, special_tokens:]
            z = (patches - patches.mean(0)) / patches.std(0).clamp_min(1e-6)
            g = head(z.T.reshape(1, channels, *grid))[0, 0].flatten() + z.mean(1)
            bias[b, s, special_tokens:] = torch.sigmoid(g) - 0.5
    return bias.flatten(1), head


MANY = (2, 2, (9, 17), 5, 72, 48)  # more of everything than a tile holds


@pytest.mark.parametrize("shape", [*SHAPES, MANY], ids=str)
def test_forward(backend, shape, device, poisoned_empty):
    for dtype in served(backend, device):
        tokens, parameters, where = make(*shape, dtype=dtype, device=device)
        out = mask_head(tokens, *parameters, **where, backend=backend)
        with torch.no_grad():
            oracle, _ = by_modules(tokens.cpu().double(), [p.cpu().double() for p in parameters], **where)
            plain, _ = by_modules(tokens.cpu(), [p.cpu() for p in parameters], **where)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_within_budget("key bias", out.cpu(), oracle, plain, slack=1e-12)  # the oracle of float64 is float64
        special = out.view(*tokens.shape[:3])[:, :, : where["special_tokens"]]
        assert not special.any() and out.abs().max() < 0.5


@pytest.mark.parametrize("shape", [*SHAPES, MANY], ids=str)
def test_gradients(backend, shape, device, poisoned_empty):
    for dtype in served(backend, device):
        tokens, parameters, where = make(*shape, dtype=dtype, device=device)
        leaves = [p.requires_grad_() for p in parameters]
        tokens.requires_grad_()
        d_out = torch.randn(
            tokens.shape[0], tokens.shape[1] * tokens.shape[2], generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        out = mask_head(tokens, *leaves, **where, backend=backend)
        gradients = torch.autograd.grad(out, [*leaves, tokens], d_out.to(out), allow_unused=True)
        assert gradients[-1] is None  # the tokens are detached by definition

        def by_autograd(dtype, tokens=tokens, parameters=parameters, where=where, d_out=d_out):
            bias, head = by_modules(tokens.detach().cpu().to(dtype), [p.detach().cpu().to(dtype) for p in parameters], **where)
            return torch.autograd.grad(bias, list(head.parameters()), d_out.to(dtype))

        # a sum of terms of either sign: its rounding follows the size of the terms, not of the sum
        slack = float(d_out.norm()) * (1e-13 if dtype == torch.float64 else 1.2e-7)
        names = ("w0", "b0", "w2", "b2", "w4", "b4")
        for name, gradient, exact, plain in zip(names, gradients[:-1], by_autograd(torch.float64), by_autograd(dtype), strict=True):
            assert gradient.dtype == dtype
            assert_within_budget(name, gradient.cpu(), exact, plain, slack=slack)


def test_a_large_mean_costs_no_digits(backend, device):
    served(backend, device)
    tokens, parameters, where = make(*MANY, device=device)
    tokens += 300
    out = mask_head(tokens, *parameters, **where, backend=backend)
    with torch.no_grad():
        oracle, _ = by_modules(tokens.cpu().double(), [p.cpu().double() for p in parameters], **where)
    assert (out.cpu().double() - oracle).abs().max() < 2e-5


def test_constant_patches_do_not_divide_by_zero(backend):
    tokens, parameters, where = make(1, 1, (3, 4), 5, device=default_device(backend))
    out = mask_head(torch.ones_like(tokens), *parameters, **where, backend=backend)
    assert out.isfinite().all()


def test_the_smallest_standard_deviation(backend):
    """1e-6, below which a channel is not blown up further."""
    dtype = torch.float64 if torch.float64 in served(backend, default_device(backend)) else torch.float32
    tokens, parameters, where = make(1, 1, (3, 4), 5, dtype=dtype, device=default_device(backend))
    tokens[..., 0] *= 1e-6 / 3
    tokens[..., 1] *= 1e-7 / 3
    oracle, _ = by_modules(tokens.cpu().double(), [p.cpu().double() for p in parameters], **where)
    out = mask_head(tokens, *parameters, **where, backend=backend).cpu().double()
    assert torch.allclose(out, oracle, atol=1e-9 if dtype == torch.float64 else 2e-6)


def test_autocast_changes_nothing(backend):
    tokens, parameters, where = make(2, 2, (3, 4), 5, device=default_device(backend))
    expected = mask_head(tokens, *parameters, **where, backend=backend)
    with torch.autocast(default_device(backend), torch.bfloat16):
        assert torch.equal(mask_head(tokens, *parameters, **where, backend=backend), expected)


def test_opcheck(backend):
    tokens, parameters, _ = make(2, 2, (3, 4), 5, device=default_device(backend))
    leaves = [p.requires_grad_() for p in parameters]
    torch.library.opcheck(torch.ops.page4d.mask_head.default, (tokens, leaves, [3, 4], 5, backend))


@pytest.mark.slow
def test_compiles_without_graph_break(backend):
    tokens, parameters, where = make(2, 2, (3, 4), 5, device=default_device(backend))
    compiled = torch.compile(lambda *x: mask_head(*x, **where, backend=backend), fullgraph=True)
    assert torch.allclose(compiled(tokens, *parameters), mask_head(tokens, *parameters, **where, backend=backend), atol=1e-6)
