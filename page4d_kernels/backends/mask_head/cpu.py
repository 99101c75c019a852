"""Our compiled CPU kernels (csrc/cpu/head.h). Backward: the reference's formulas."""

from __future__ import annotations

from torch import Tensor

from ... import native
from ...reference.mask_head import mask_head_backward
from .. import native_common
from ..registry import Backend
from . import compiled


def _forward(tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> Tensor:
    return compiled.forward("mask_head", tokens, parameters, grid, special_tokens, launch_args=native.cpu_launch_args(tokens))


BACKEND = Backend(
    "cpu",
    "our compiled kernels; backward by PyTorch",
    _forward,
    mask_head_backward,
    unsupported=native_common.unsupported,
    unavailable=native_common.unavailable,
    auto_skips=native_common.no_vector_level,
)
