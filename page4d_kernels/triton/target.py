"""The target of the kernels: a GPU, or Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import torch
import triton

AMD = ("gfx942", "gfx950")  # MI300 and MI350: what has been compiled ahead of time


def interpreted() -> bool:
    """Whether kernels run in the interpreter. Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> list[str]:
    """Why Triton kernels cannot run on this machine."""
    if interpreted():
        return []
    if not torch.cuda.is_available():
        return ["Triton kernels need a CUDA device (or TRITON_INTERPRET=1, for tests)"]
    found = capability()
    if isinstance(found, str) and found not in AMD:
        return [f"on AMD the Triton kernels have been compiled for {' and '.join(AMD)} only (and run on neither), this is {found}"]
    return []


def capability() -> int | str:
    """Compute capability of the current target, 90 for Hopper; an AMD architecture's name, "gfx942"; 0 in the interpreter."""
    return 0 if interpreted() else triton.runtime.driver.active.get_current_target().arch


def architecture() -> str:
    """The name of the current target: sm_90, gfx942."""
    found = capability()
    return found if isinstance(found, str) else f"sm_{found}"


def matrix_unit() -> str:
    """The matrix instructions of the current target, by which tiles are chosen: mma, wgmma (Hopper), tcgen05 (sm_100) or mfma (AMD)."""
    found = capability()
    if isinstance(found, str):
        return "mfma"
    return "wgmma" if found == 90 else "tcgen05" if 100 <= found < 120 else "mma"


def precision(dtype: torch.dtype) -> str:
    """Precision of a matmul with an fp32 operand: three tf32 products for fp32 tensors, one for half-precision ones. AMD has no tf32."""
    if matrix_unit() == "mfma":
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


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
