"""Classes of problems. The backends of one op are compared once per class, and "auto" looks a problem's class up in the record."""

from __future__ import annotations

from typing import Any

import torch

LENGTHS = (512, 2048, 8192)  # upper limits of the length classes, in tokens
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
FORWARD, TRAINING = "forward", "training"  # training is forward and backward


def direction_of(problem: Any) -> str:
    return TRAINING if problem.needs_grad else FORWARD


def part(dtype: str, direction: str, variant: str) -> str:
    """Such as "bfloat16 forward, head dim 64". A backend passes or fails the battery for a part."""
    return f"{dtype} {direction}" + f", {variant}" * bool(variant)


def part_of(problem: Any) -> str:
    return part(DTYPES[problem.dtype], direction_of(problem), problem.variant)


def class_of(problem: Any) -> str:
    """Such as "bfloat16 forward, head dim 64: mask with layout, up to 2048 tokens". It depends on no exact length, batch or heads."""
    limit = next((limit for limit in LENGTHS if problem.length <= limit), None)
    length = f"over {LENGTHS[-1]} tokens" if limit is None else f"up to {limit} tokens"
    return f"{part_of(problem)}: " + ", ".join(word for word in (problem.kind, length) if word)


def part_in(name: str) -> str:
    """The part of a class, by the class's name."""
    return name.partition(":")[0]
