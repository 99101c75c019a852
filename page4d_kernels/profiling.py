"""Named stages for profilers and reports.

Every stage is a label in a torch.profiler trace. With PAGE4D_NVTX=1 it is also an NVTX range for Nsight, and inside `record` its seconds
and peak memory are measured.
"""

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

DOMAIN = "page4d"


@dataclass
class Stage:
    """The cost of one stage, summed over its runs."""

    runs: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0  # peak of the process up to the end of the stage: resident on CPU, allocated on CUDA


@dataclass
class Recording:
    """Stages by name, in order of first appearance. A nested stage also counts in the stage around it."""

    device: torch.device
    on_stage: Callable[[str], object] | None = None  # called at the end of each stage
    stages: dict[str, Stage] = field(default_factory=dict)


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("page4d_recording", default=None)


@dataclass(frozen=True)
class NvtxRanges:
    """How NVTX ranges are opened and closed. They nest."""

    push: Callable[[str], object]
    pop: Callable[[], object]


def _nvtx_ranges() -> NvtxRanges | None:
    """Ranges of the `nvtx` package in the domain "page4d", else torch's, else none.

    The category is the kind of stage: "frame" for "frame 3", "depth head" for "depth head".
    """
    try:
        import nvtx
    except ImportError:
        return NvtxRanges(torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop) if torch.cuda.is_available() else None

    def push(name: str) -> None:
        nvtx.push_range(name, domain=DOMAIN, category=name.rstrip(" 0123456789"))

    return NvtxRanges(push, lambda: nvtx.pop_range(domain=DOMAIN))


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated on a CUDA device, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage, which on Linux starts a process with its parent's peak
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Restart `peak_bytes` from the memory held now. Works on CUDA and Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def record(device: torch.device | str) -> Iterator[Recording]:
    """Measure every `stage` inside the block. Synchronises a CUDA device at both ends of each stage: for reports, not for benchmarks."""
    recording = Recording(torch.device(device))
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether the caller is inside a `record` block."""
    return _recording.get() is not None


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Name the work inside the block, for profilers and for `record`."""
    if torch.compiler.is_compiling():
        yield
        return
    recording = _recording.get()
    ranges = _nvtx_ranges() if env.flag("PAGE4D_NVTX") else None
    if ranges is not None:
        ranges.push(name)
    traced = torch.profiler.record_function(name)
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
        if ranges is not None:
            ranges.pop()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
