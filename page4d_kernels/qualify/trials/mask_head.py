"""Trials and timed calls of `mask_head`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...backends.mask_head.problem import MaskHeadProblem
from ...ops.mask_head import mask_head
from ..trial import Draw, Setting, Timed, Trial, at_an_odd_address, compared, differentiate

NAMES = ("depthwise_weight", "depthwise_bias", "hidden_weight", "hidden_bias", "out_weight", "out_bias")
# Kernels round the operands of the C -> hidden matmul: to tf32 for half-precision tokens, to bf16 on a CPU.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def variant(setting: Setting) -> str:
    return ""


def trials(setting: Setting, draw: Draw) -> Iterator[Trial]:
    dtype, device, training = setting.dtype, setting.device, setting.training
    for name, batch, frames, special, channels, hidden in (
        ("few channels", 1, 2, 5, 24, 16),
        ("more of everything than a tile holds", 2, 2, 5, 72, 48),
        ("no special tokens", 2, 1, 0, 40, 33),
        ("at an odd address", 1, 2, 5, 64, 32),
        ("the official widths", 1, 1, 5, 1024, 256),
    ):
        grid = (draw.size(2, 14), draw.size(2, 19))
        draw.lengths.append(grid[0] * grid[1])
        tensors = _tensors(batch, frames, grid, special, channels, hidden, dtype, device, draw.seed())
        if name == "at an odd address":
            tensors = {name: at_an_odd_address(x) for name, x in tensors.items()}

        def call(given: dict[str, Tensor], backend: str, grid=grid, special=special) -> list[Tensor]:
            return [mask_head(**given, grid=grid, special_tokens=special, backend=backend)]

        problem = MaskHeadProblem(device, dtype, batch, frames, grid, special, channels, hidden, training)
        run, expected = compared(["bias"], tensors, NAMES if training else (), call, tolerance=TOLERANCE[dtype])
        yield Trial(f"{name} ({grid[0]} x {grid[1]} patches)", problem, run, expected, tuple(tensors.values()))


def _tensors(batch, frames, grid, special, channels, hidden, dtype, device, seed) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, frames, special + grid[0] * grid[1], channels, generator=generator) * 3 + 1
    shapes = [(channels, 1, 3, 3), (channels,), (hidden, channels, 1, 1), (hidden,), (1, hidden, 1, 1), (1,)]
    parameters = [torch.randn(shape, generator=generator) * channels**-0.5 for shape in shapes]
    return {"tokens": tokens.to(device, dtype)} | {name: x.to(device) for name, x in zip(NAMES, parameters, strict=True)}


def timed(setting: Setting) -> Iterator[Timed]:
    """At the official size: 2, 4 and (on a GPU) 20 frames."""
    dtype, device, training = setting.dtype, setting.device, setting.training
    for frames in (4, 2, 20) if device == "cuda" else (4, 2):
        tensors = _tensors(1, frames, (24, 37), 5, 1024, 256, dtype, device, 0)
        leaves = {name: tensors[name].requires_grad_() for name in NAMES} if training else {}

        def run(backend: str, tensors=tensors, leaves=leaves) -> object:
            with torch.set_grad_enabled(training):
                out = mask_head(**tensors, grid=(24, 37), special_tokens=5, backend=backend)
                return differentiate([out], leaves) if training else out

        yield Timed(MaskHeadProblem(device, dtype, 1, frames, (24, 37), 5, 1024, 256, training), run)
