"""What all backends of the compiled library have in common: when they are missing, which devices and dtypes they serve."""

from __future__ import annotations

from typing import Any

from .. import native


def missing() -> list[str]:
    reason = native.why_missing()
    return [f"the compiled library: {reason}"] if reason else []


def limits(problem: Any) -> list[str]:
    """Reasons of a problem with a device and a dtype."""
    reasons = []
    if problem.device != "cpu":
        reasons.append(f"it runs on cpu, the tensors are on {problem.device}")
    if problem.dtype not in native.DTYPES:
        reasons.append(f"it takes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    return reasons


def plain_loops(problem: Any) -> list[str]:
    """Why "auto" goes on: without vector instructions PyTorch is faster."""
    return ["it has only plain loops for this processor"] if native.level() == 0 else []
