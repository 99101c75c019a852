"""Shared by the backends of the compiled library: when they are unavailable, and which devices and dtypes they serve."""

from __future__ import annotations

from typing import Any

import torch

from .. import native


def unavailable() -> list[str]:
    reason = native.why_missing()
    return [f"the compiled library: {reason}"] if reason else []


def unsupported(problem: Any) -> list[str]:
    """The reasons that follow from the device and dtype of `problem`."""
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"it runs on cpu, the tensors are on {problem.device}")
    if problem.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"it takes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    return reasons


def cuda_unavailable(function: str) -> list[str]:
    reason = native.why_no_cuda(function)
    if reason:
        return [f"the compiled library: {reason}"]
    return [] if torch.cuda.is_available() else ["there is no CUDA device"]


def cuda_unsupported(problem: Any) -> list[str]:
    reasons = []
    if problem.device != "cuda":
        reasons.append(f"it runs on cuda, the tensors are on {problem.device}")
    if problem.dtype not in native.DTYPES:
        reasons.append(f"it takes float32, float16 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    return reasons


def no_vector_level(problem: Any) -> list[str]:
    """`auto_skips`: without vector instructions PyTorch is faster."""
    return ["it has only plain loops for this processor"] if native.level() == 0 else []
