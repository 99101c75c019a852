"""Named stages: a profiler label each, an NVTX range for Nsight when PAGE4D_NVTX=1, seconds and peak memory when recorded."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import env


@dataclass
class Stage:
    """What one stage cost, summed over its runs."""

    runs: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0  # highest memory of the process so far, by the end of the stage: resident on CPU, allocated on CUDA


@dataclass
class Recording:
    """Stages by name, in order of first appearance. A nested stage is also counted in the one around it."""

    device: torch.device
    on_stage: Callable[[str], object] | None = None  # called at the end of each stage
    stages: dict[str, Stage] = field(default_factory=dict)


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("page4d_recording", default=None)


def peak_bytes(device: torch.device) -> int:
    """Highest memory so far in bytes: allocated on a CUDA device, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage: on Linux a process starts with its parent's peak there
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """`peak_bytes` starts again from what is held now, where the system lets it (CUDA and Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def record(device: torch.device | str) -> Iterator[Recording]:
    """Measure every `stage` run inside. Synchronises a CUDA device at both ends of each stage: for reports, not for benchmarks."""
    recording = Recording(torch.device(device))
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Name the work inside, for Nsight and for `record`."""
    if torch.compiler.is_compiling():
        yield
        return
    recording = _recording.get()
    mark = env.flag("PAGE4D_NVTX") and torch.cuda.is_available()
    if mark:
        torch.cuda.nvtx.range_push(name)
    traced = torch.profiler.record_function(name)  # names the stage in a torch profiler trace
    traced.__enter__()
    if recording is not None:
        _synchronize(recording.device)
        start = time.perf_counter()
    try:
        yield
    finally:
        if recording is not None:
            _synchronize(recording.device)
            entry = recording.stages.setdefault(name, Stage())
            entry.runs += 1
            entry.seconds += time.perf_counter() - start
            entry.peak_bytes = max(entry.peak_bytes, peak_bytes(recording.device))
            if recording.on_stage is not None:
                recording.on_stage(name)
        traced.__exit__(None, None, None)
        if mark:
            torch.cuda.nvtx.range_pop()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
