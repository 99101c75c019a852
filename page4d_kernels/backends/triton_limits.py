"""What all Triton backends have in common: loading on first use, when they are missing, which devices and dtypes they serve."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch


def missing() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed (pip install triton)"]
    from ..triton import target

    return target.missing()


def limits(problem: Any) -> list[str]:
    """Reasons of a problem with a device and a dtype."""
    from ..triton.target import interpreted

    reasons = []
    if problem.device != ("cpu" if interpreted() else "cuda"):
        reasons.append(f"it runs on {'cpu, in the interpreter' if interpreted() else 'cuda'}, the tensors are on {problem.device}")
    if problem.dtype == torch.float64:
        reasons.append("it takes float32, float16 and bfloat16, not float64")
    if interpreted() and problem.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 wrongly")
    return reasons


def launch(op: str, direction: str) -> Callable[..., Any]:
    """`direction` ("forward" or "backward") of an op's launch module, which is imported when it is called."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"page4d_kernels.triton.{op}_launch"), direction)(*args)

    return run
