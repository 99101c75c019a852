"""Our Triton kernels. Not yet run on a GPU: held by the interpreter and by ahead-of-time compilation, and not taken by "auto"."""

from __future__ import annotations

from .. import triton_limits
from ..registry import Backend
from .problem import ResidualNormProblem

CHANNELS = 4096  # of the official model's widest blocks 2048; a program holds whole rows


def why_not(problem: ResidualNormProblem) -> list[str]:
    reasons = triton_limits.limits(problem)
    if problem.channels > CHANNELS:
        reasons.append(f"it takes up to {CHANNELS} channels, not {problem.channels}")
    return reasons


BACKEND = Backend(
    "triton",
    "one pass over the residual stream; not yet run on a GPU",
    triton_limits.launch("residual_norm", "forward"),
    triton_limits.launch("residual_norm", "backward"),
    why_not=why_not,
    missing=triton_limits.missing,
)
