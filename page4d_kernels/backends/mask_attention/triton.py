"""Our Triton kernels. Not yet run on a GPU: held by the interpreter and by ahead-of-time compilation, and not taken by "auto"."""

from __future__ import annotations

from .. import triton_limits
from ..registry import Backend
from .problem import AttentionProblem, all_of

MAX_HEAD_DIM = 128


def _head_dim(problem: AttentionProblem) -> list[str]:
    return [f"its head dim goes up to {MAX_HEAD_DIM}, not {problem.head_dim}"] if problem.head_dim > MAX_HEAD_DIM else []


BACKEND = Backend(
    "triton",
    "our Triton kernels; not yet run on a GPU",
    triton_limits.launch("mask_attention", "forward"),
    triton_limits.launch("mask_attention", "backward"),
    why_not=all_of(triton_limits.limits, _head_dim),
    missing=triton_limits.missing,
)
