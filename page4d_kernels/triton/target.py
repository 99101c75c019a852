"""The target of the kernels: a GPU, or Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton

T = TypeVar("T")
AMD = ("gfx942", "gfx950")  # MI300 and MI350: what has been compiled ahead of time


class Target(NamedTuple):
    """What launches depend on. Two devices of one kind are one target."""

    capability: int | str  # compute capability, 90 for Hopper; an AMD architecture's name, "gfx942"; 0 in the interpreter
    shared: int  # maximum bytes of shared memory per program
    multiprocessors: int


INTERPRETER = Target(0, 1 << 30, 1)
REGISTERS = 255  # maximum per thread


def interpreted() -> bool:
    """Whether kernels run in the interpreter. Triton reads the variable when a kernel is defined."""
    return triton.knobs.runtime.interpret


def device_type() -> str:
    """Where the tensors of a launch must be."""
    return "cpu" if interpreted() else "cuda"


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


def current() -> Target:
    """The target that a launch would have now: the current device, which is the tensors' (see `backends/triton_common.py`)."""
    if interpreted():
        return INTERPRETER
    driver = triton.runtime.driver.active
    return _ask(driver, driver.get_current_device())


@lru_cache(maxsize=64)
def _ask(driver: Any, device: int | str) -> Target:
    """Each device is asked once, because an answer can take a millisecond: the driver reads the clock rates with the rest."""
    properties = driver.utils.get_device_properties(device)
    return Target(driver.get_current_target().arch, properties["max_shared_mem"], properties["multiprocessor_count"])


def per_target(function: Callable[..., T]) -> Callable[..., T]:
    """`function` of hashable arguments, computed once per target."""
    cached = lru_cache(maxsize=None)(lambda target, *args: function(*args))

    @wraps(function)
    def once(*args: Any) -> T:
        return cached(current(), *args)

    return once


def capability() -> int | str:
    """Compute capability or architecture of the current target: see `Target`."""
    return current().capability


# The choice of a backend asks these two, and torch.compile traces the choice but cannot trace Triton. This is what
# torch.compiler.assume_constant_result sets, without importing the compiler.
interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def multiprocessors() -> int:
    """Number of multiprocessors, used to choose the number of key splits. 1 in the interpreter."""
    return current().multiprocessors


def limits() -> tuple[int, int]:
    """Maximum bytes of shared memory per program and maximum registers per thread."""
    return current().shared, REGISTERS
