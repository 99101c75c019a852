"""Shared by the Triton backends: launch modules imported on first use, and the devices and dtypes that the backends serve."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .registry import Backend


def unavailable() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed (pip install triton)"]
    from ..triton import target

    return target.unavailable()


def unsupported(problem: Any) -> list[str]:
    """The reasons that follow from the device and dtype of `problem`."""
    from ..triton import target

    reasons = []
    if problem.device != target.device_type():
        where = "cpu, in the interpreter" if target.interpreted() else "cuda"
        reasons.append(f"it runs on {where}, the tensors are on {problem.device}")
    if problem.dtype == torch.float64:
        reasons.append("it takes float32, float16 and bfloat16, not float64")
    if problem.dtype == torch.bfloat16 and target.interpreted():
        reasons.append("Triton's interpreter computes bfloat16 wrongly")
    return reasons


def launch(op: str, direction: str) -> Callable[..., Any]:
    """The function `direction` ("forward" or "backward") of an op's launch module, called with the tensors' device as the current one.

    Triton launches on the current device, whatever device the tensors are on. The module is imported on the first call.
    """

    @functools.cache
    def module() -> ModuleType:
        return importlib.import_module(f"page4d_kernels.triton.{op}_launch")

    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0].q
        with torch.cuda.device_of(first):  # restores the caller's current device afterwards
            return getattr(module(), direction)(*args)

    return run


def backend(op: str, summary: str, also_unsupported: Callable[[Any], list[str]] | None = None) -> Backend:
    """The Triton backend of `op`: forward and backward of `triton/<op>_launch.py`. `also_unsupported` adds further reasons."""

    def all_unsupported(problem: Any) -> list[str]:
        return unsupported(problem) + (also_unsupported(problem) if also_unsupported else [])

    return Backend("triton", summary, launch(op, "forward"), launch(op, "backward"), unsupported=all_unsupported, unavailable=unavailable)
