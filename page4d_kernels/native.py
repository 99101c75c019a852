"""The compiled library, loaded on first use, and the reason when it is absent.

It does not depend on torch or on an installed CUDA. It takes addresses, sizes and strides.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import env

INTERFACE = 5  # of the functions in csrc/bindings.cpp; must equal the number in csrc/include/page4d/common.h
LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RECORD = Path(__file__).parent / "build_record.json"
_REBUILD = "build it again with `pip install -e .`"


def build_record() -> dict[str, Any]:
    """The record that the build wrote: built, reason, compiler, levels, cuda, left_out. Empty if there is none."""
    try:
        return json.loads(_RECORD.read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("page4d_kernels._native")
    except ImportError as error:
        record = build_record()
        if not record:
            return None, f"it was not built: {_REBUILD}"
        return None, f"it was not built: {record['reason']}" if not record.get("built") else f"it does not load ({error}): {_REBUILD}"
    found = getattr(module, "interface", None)
    if found != INTERFACE:
        return None, f"it was built from other sources (interface {found}, these sources need {INTERFACE}): {_REBUILD}"
    return module, ""


def why_missing() -> str:
    """Why the compiled library cannot be used, in words; empty if it can."""
    return _load()[1]


# what torch.compiler.assume_constant_result sets, without importing the compiler: dynamo must not trace the loading of the library
why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def report() -> list[str]:
    """The lines about the library in the output of `python -m page4d_kernels.info`."""
    reason, record = why_missing(), build_record()
    if reason:
        return [reason]
    levels = ", ".join(record.get("levels", []))
    lines = [f"built by {record.get('compiler', 'an unknown compiler')} for {levels}; this processor takes {best_level()}"]
    if record.get("cuda"):
        lines.append(f"CUDA kernels built by {record['cuda']}")
    return lines + [f"left out {line}" for line in record.get("left_out", [])]


def library() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the compiled library is not there: {reason}")
    return module


def why_no_cuda(function: str) -> str:
    """Why there is no such CUDA kernel, in words; empty if it was built. Does not test whether a device can run it."""
    module, reason = _load()
    if module is None:
        return reason
    if hasattr(module, function):
        return ""
    left_out = [line.partition(": ")[2] for line in build_record().get("left_out", []) if line.startswith("cuda")]
    return f"it was built without {function}: {left_out[0] if left_out else _REBUILD}"


why_no_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


def best_level() -> str:
    """The highest instruction set of this processor that the library was compiled with."""
    return LEVELS[library().best_level()]


def level() -> int:
    """The instruction set that the kernels use: the best one, or PAGE4D_CPU_LEVEL if that is lower."""
    best = int(library().best_level())
    cap = env.get("PAGE4D_CPU_LEVEL")
    if not cap:
        return best
    if cap not in LEVELS:
        raise env.VariableError(f"PAGE4D_CPU_LEVEL={cap!r}: choose one of {', '.join(LEVELS)}")
    return min(best, LEVELS.index(cap))


level._dynamo_marked_constant = True  # type: ignore[attr-defined]


def peak_rate(dtype: torch.dtype, exponentials: bool = False) -> float:
    """Run a fixed number of multiply-adds (or 2^x) on all threads, with operands in registers. Returns the work done, in FLOP (or values).

    Divided by its run time, this is the peak rate of the processor at the level in use. Returns 0 if the level is `scalar`.
    """
    return library().peak_rate(DTYPES[dtype], exponentials, torch.get_num_threads(), level())


def cpu_launch_args(x: Tensor) -> tuple[int, int, int]:
    """The last arguments of every CPU kernel: dtype, threads, level."""
    return DTYPES[x.dtype], torch.get_num_threads(), level()


def cuda_launch_args(x: Tensor) -> tuple[int, int, int]:
    """The last arguments of every CUDA kernel: dtype, device, the current stream."""
    return DTYPES[x.dtype], x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def mask_head_shared_memory(hidden: int, width: int, device: int) -> tuple[int, int]:
    """The shared memory in bytes that a block of the CUDA mask head needs, and the most that a block of `device` can have."""
    return library().mask_head_cuda_shared_bytes(hidden, width), library().cuda_shared_memory(device)


mask_head_shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fp32(x: Tensor) -> Tensor:
    """Parameters in the form that the kernels read: fp32, contiguous."""
    return x.detach().to(torch.float32).contiguous()
