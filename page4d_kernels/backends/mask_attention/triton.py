"""Our Triton kernels. Not yet run on a GPU; tested in the interpreter and by ahead-of-time compilation."""

from __future__ import annotations

from .. import triton_common
from .problem import AttentionProblem

MAX_HEAD_DIM = 128


def _head_dim(problem: AttentionProblem) -> list[str]:
    return [f"its head dim goes up to {MAX_HEAD_DIM}, not {problem.head_dim}"] if problem.head_dim > MAX_HEAD_DIM else []


BACKEND = triton_common.backend("mask_attention", "our Triton kernels; not yet run on a GPU", _head_dim)
