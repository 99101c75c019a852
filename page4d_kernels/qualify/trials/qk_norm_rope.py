"""Trials and timed calls of `qk_norm_rope`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...backends.qk_norm_rope.problem import QkNormRopeProblem
from ...ops.qk_norm_rope import qk_norm_rope
from ...reference.qk_norm_rope import rope_tables
from ..trial import Draw, Setting, Timed, Trial, at_an_odd_address, compared, differentiate

LEAVES = ("qkv", "q_weight", "q_bias", "k_weight", "k_bias")


def variant(setting: Setting) -> str:
    return f"head dim {setting.head_dim}"


def trials(setting: Setting, draw: Draw) -> Iterator[Trial]:
    dtype, device, training, head_dim = setting.dtype, setting.device, setting.training, setting.head_dim
    shapes = ((5, 2, 1, False), (0, 3, 2, False), (1, 1, 1, False), (5, 2, 2, True))  # special tokens, frames, batch, at an odd address
    for special, frames, batch, odd in shapes:
        grid = (draw.size(1, 13), draw.size(2, 17))
        tokens = frames * (special + grid[0] * grid[1])
        draw.lengths.append(tokens)
        tensors = _tensors(batch, tokens, grid, 3, head_dim, dtype, device, draw.seed())
        if odd:
            tensors = {name: at_an_odd_address(x) for name, x in tensors.items()}

        def call(given: dict[str, Tensor], backend: str, grid=grid, special=special) -> tuple[Tensor, ...]:
            return qk_norm_rope(*given.values(), grid=grid, special_tokens=special, backend=backend)

        problem = QkNormRopeProblem(device, dtype, batch, tokens, 3, head_dim, grid, special, training)
        tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        run, expected = compared(["q", "k", "v"], tensors, LEAVES if training else (), call, tolerance=tolerance)
        name = f"{frames} frames of {grid[0]} x {grid[1]} patches" + ", at an odd address" * odd
        yield Trial(name, problem, run, expected, tuple(tensors.values()))


def _tensors(batch, tokens, grid, heads, head_dim, dtype, device, seed) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator)
    vectors = [torch.randn(head_dim, generator=generator) for _ in range(4)]
    given = dict(zip(LEAVES, (x.to(device, dtype) for x in (qkv, *vectors)), strict=True))
    return given | dict(zip(("cos", "sin"), rope_tables(grid, head_dim, device=device), strict=True))


def timed(setting: Setting) -> Iterator[Timed]:
    """At the official size: 2, 4 and (on a GPU) 20 frames."""
    dtype, device, training, head_dim = setting.dtype, setting.device, setting.training, setting.head_dim
    for frames in (4, 2, 20) if device == "cuda" else (4, 2):
        tensors = _tensors(1, frames * 893, (24, 37), 16, head_dim, dtype, device, 0)
        leaves = {name: tensors[name].requires_grad_() for name in LEAVES} if training else {}

        def run(backend: str, tensors=tensors, leaves=leaves) -> object:
            with torch.set_grad_enabled(training):
                q, k, _ = qk_norm_rope(*tensors.values(), grid=(24, 37), special_tokens=5, backend=backend)
                return differentiate([q, k], leaves) if training else (q, k)

        yield Timed(QkNormRopeProblem(device, dtype, 1, frames * 893, 16, head_dim, (24, 37), 5, training), run)
