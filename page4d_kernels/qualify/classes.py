"""Classes of problems. The backends of one op are compared once per class, and "auto" looks a problem's class up in the record."""

from __future__ import annotations

from typing import Any

import torch

LENGTHS = (512, 2048, 8192)  # upper limits of the length classes, in tokens
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
FORWARD, TRAINING = "forward", "training"  # training is forward and backward


def direction_of(problem: Any) -> str:
    return TRAINING if problem.needs_grad else FORWARD


def part_of(problem: Any) -> str:
    """Dtype and direction, such as "bfloat16 forward". A backend passes or fails the battery for these."""
    return f"{DTYPES[problem.dtype]} {direction_of(problem)}"


def class_of(problem: Any) -> str:
    """Such as "bfloat16 forward, mask and layout, up to 2048 tokens". It depends on no exact length, and not on batch or heads."""
    limit = next((limit for limit in LENGTHS if problem.length <= limit), None)
    length = f"over {LENGTHS[-1]} tokens" if limit is None else f"up to {limit} tokens"
    return ", ".join(word for word in (part_of(problem), problem.kind, length) if word)
