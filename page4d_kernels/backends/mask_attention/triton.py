"""Our Triton kernels. Not yet run on a GPU: held by the interpreter and by ahead-of-time compilation, and not taken by "auto"."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from ..registry import Backend
from .problem import HALF, AttentionProblem

MAX_HEAD_DIM = 128


def _missing() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed (pip install triton)"]
    from ...triton.target import missing

    return missing()


def _why_not(problem: AttentionProblem) -> list[str]:
    from ...triton.target import interpreted

    reasons = []
    if problem.device != ("cpu" if interpreted() else "cuda"):
        reasons.append(f"it runs on {'cpu, in the interpreter' if interpreted() else 'cuda'}, the tensors are on {problem.device}")
    if problem.dtype not in (*HALF, torch.float32):
        reasons.append("it takes float32, float16 and bfloat16, not float64")
    if interpreted() and problem.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 wrongly")
    if problem.head_dim > MAX_HEAD_DIM:
        reasons.append(f"its head dim goes up to {MAX_HEAD_DIM}, not {problem.head_dim}")
    return reasons


def _forward(*args):
    return importlib.import_module("page4d_kernels.triton.mask_attention_launch").forward(*args)


def _backward(*args):
    return importlib.import_module("page4d_kernels.triton.mask_attention_launch").backward(*args)


BACKEND = Backend(
    "triton",
    "our Triton kernels; not yet run on a GPU",
    _forward,
    _backward,
    why_not=_why_not,
    missing=_missing,
)
