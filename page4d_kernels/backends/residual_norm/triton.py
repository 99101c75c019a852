"""Our Triton kernels. Not yet run on a GPU; tested in the interpreter and by ahead-of-time compilation."""

from __future__ import annotations

from .. import triton_common
from .problem import ResidualNormProblem

MAX_CHANNELS = 4096  # a program holds whole rows; the official model has at most 2048


def _channels(problem: ResidualNormProblem) -> list[str]:
    return [f"it takes up to {MAX_CHANNELS} channels, not {problem.channels}"] if problem.channels > MAX_CHANNELS else []


BACKEND = triton_common.backend("residual_norm", "one pass over the residual stream; not yet run on a GPU", _channels)
