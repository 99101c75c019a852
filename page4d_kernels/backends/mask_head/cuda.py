"""Our CUDA kernels (csrc/cuda/mask_head.cuh). Not yet run on a GPU. Backward: the reference's formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...reference.mask_head import mask_head_backward
from .. import native_common
from ..registry import Backend
from . import compiled
from .problem import MaskHeadProblem

MAX_HIDDEN, MAX_WIDTH = 256, 300


def _forward(tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> Tensor:
    batch, frames, _, channels = tokens.shape
    statistics = torch.empty(2, batch * frames, channels, dtype=torch.float32, device=tokens.device)
    working_space = [statistics[0].data_ptr(), statistics[1].data_ptr()]
    with torch.cuda.device_of(tokens):  # restores the caller's current device afterwards
        return compiled.forward(
            "mask_head_cuda", tokens, parameters, grid, special_tokens, working_space, launch_args=native.cuda_launch_args(tokens)
        )


def _unsupported(problem: MaskHeadProblem) -> list[str]:
    reasons = native_common.cuda_unsupported(problem)
    if problem.device == "cuda" and problem.hidden <= MAX_HIDDEN and problem.grid[1] <= MAX_WIDTH:
        needed, available = native.mask_head_shared_memory(problem.hidden, problem.grid[1], torch.cuda.current_device())
        if needed > available:
            reasons.append(
                f"{problem.hidden} hidden units and {problem.grid[1]} patches in a row need {needed / 1024:.1f} KiB of shared memory "
                f"per block, this GPU has {available / 1024:.1f}"
            )
    if problem.hidden > MAX_HIDDEN:
        reasons.append(f"its hidden layer goes up to {MAX_HIDDEN}, not {problem.hidden}")
    if problem.grid[1] > MAX_WIDTH:
        reasons.append(f"its grids are up to {MAX_WIDTH} patches wide, not {problem.grid[1]}")
    if problem.batch * problem.frames > 65535:
        reasons.append(f"it takes up to 65535 frames, not {problem.batch * problem.frames}")
    return reasons


BACKEND = Backend(
    "cuda",
    "our CUDA kernels, sm_80 and newer; not yet run on a GPU; backward by PyTorch",
    _forward,
    mask_head_backward,
    unsupported=_unsupported,
    unavailable=lambda: native_common.cuda_unavailable("mask_head_cuda"),
)
