"""Our compiled CPU kernels (csrc/cpu/head.h). Backward: the reference's formulas."""

from __future__ import annotations

from torch import Tensor

from ... import native
from ...reference.mask_head import mask_head_backward
from .. import native_limits
from ..registry import Backend
from . import compiled


def _forward(tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> Tensor:
    return compiled.forward("mask_head", tokens, parameters, grid, special_tokens, where=native.common(tokens))


BACKEND = Backend(
    "cpu",
    "our compiled kernels; backward by PyTorch",
    _forward,
    mask_head_backward,
    why_not=native_limits.limits,
    missing=native_limits.missing,
    passed_over=native_limits.plain_loops,
)
