"""Trials and timed calls of `residual_norm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...backends.residual_norm.problem import ResidualNormProblem
from ...ops.residual_norm import residual_norm
from ..classes import DTYPES
from ..trial import Draw, Setting, Timed, Trial, at_an_odd_address, compared, differentiate

LEAVES = ("x", "branch", "scale", "weight", "bias")


def variant(setting: Setting) -> str:
    return f"{DTYPES[setting.dtype]} branch"


def trials(setting: Setting, draw: Draw) -> Iterator[Trial]:
    """All in `dtype`, and as in the trunk: the stream and the parameters in fp32, the branch and the norm in `dtype`."""
    dtype, device, training = setting.dtype, setting.device, setting.training
    for stream in dict.fromkeys((torch.float32, dtype)):
        for channels, low, high, odd in (
            (8, 1, 40, False),
            (100, 3, 90, False),
            (1024, 1, 60, False),
            (64, 8200, 8300, False),
            (64, 5, 90, True),
        ):
            rows = draw.size(low, high)
            draw.lengths.append(rows)
            tensors = _tensors(rows, channels, stream, dtype, device, draw.seed())
            if odd:
                tensors = {name: at_an_odd_address(x) for name, x in tensors.items()}

            def call(given: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor]:
                return residual_norm(*given.values(), dtype=given["branch"].dtype, backend=backend)

            problem = ResidualNormProblem(device, stream, rows, channels, training, dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
            run, expected = compared(["sum", "norm"], tensors, LEAVES if training else (), call, tolerance=tolerance)
            yield Trial(f"{rows} rows of {channels} channels{', at an odd address' * odd}", problem, run, expected, tuple(tensors.values()))


def _tensors(rows, channels, dtype, branch_dtype, device, seed) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, branch = torch.randn(rows, channels, generator=generator) * 3 + 1, torch.randn(rows, channels, generator=generator)
    vectors = [torch.randn(channels, generator=generator).to(device, dtype) for _ in range(3)]
    return dict(zip(LEAVES, (x.to(device, dtype), branch.to(device, branch_dtype), *vectors), strict=True))


def timed(setting: Setting) -> Iterator[Timed]:
    """As in the trunk at the official size: the stream and the parameters in fp32, the branch in the compute dtype."""
    dtype, device, training = setting.dtype, setting.device, setting.training
    for frames in (4, 2, 20) if device == "cuda" else (4, 2):
        tensors = _tensors(frames * 893, 1024, torch.float32, dtype, device, 0)
        leaves = {name: x.requires_grad_() for name, x in tensors.items()} if training else {}

        def run(backend: str, tensors=tensors, leaves=leaves) -> object:
            with torch.set_grad_enabled(training):
                outputs = residual_norm(*tensors.values(), dtype=dtype, backend=backend)
                return differentiate(outputs, leaves) if training else outputs

        yield Timed(ResidualNormProblem(device, torch.float32, frames * 893, 1024, training, dtype), run)
