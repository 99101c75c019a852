"""The target of the kernels: a GPU, or Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import torch
import triton


def interpreted() -> bool:
    """Whether kernels run in the interpreter. Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> list[str]:
    """Why Triton kernels cannot run on this machine."""
    if interpreted() or torch.cuda.is_available():
        return []
    return ["Triton kernels need a CUDA device (or TRITON_INTERPRET=1, for tests)"]


def capability() -> int:
    """Compute capability of the current target, 90 for Hopper; 0 in the interpreter."""
    return 0 if interpreted() else int(triton.runtime.driver.active.get_current_target().arch)


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors, used to choose the number of key splits. 1 in the interpreter."""
    if interpreted():
        return 1
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["multiprocessor_count"]


def limits() -> tuple[int, int]:
    """Maximum bytes of shared memory per program and maximum registers per thread."""
    if interpreted():
        return 1 << 30, 255
    device = triton.runtime.driver.active.get_current_device()
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"], 255
