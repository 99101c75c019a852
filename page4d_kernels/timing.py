"""Interleaved timing of single calls, and their peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20  # larger than any GPU's L2 cache


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in seconds, and the peak bytes that one call allocates beyond what was allocated before (CUDA only)."""

    median: float
    lower: float
    upper: float
    calls: int
    peak_bytes: int | None


class Clock:
    """Times single calls on a device. On a GPU, the L2 cache is flushed before each call."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if self.cuda else None

    def seconds(self, run: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def interleaved(runs: Mapping[str, Callable[[], object]], device: str, seconds: float) -> dict[str, Timing]:
    """Time the variants in turn, in 3 to 100 rounds that take about `seconds` in total."""
    clock = Clock(device)
    peaks = {name: clock.peak_bytes(run) for name, run in runs.items()}  # this also warms up
    round_seconds = sum(clock.seconds(run) for run in runs.values())
    rounds = max(3, min(100, int(seconds / max(round_seconds, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(clock.seconds(run))
    timings = {}
    for name, values in samples.items():
        lower, median, upper = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, lower, upper, rounds, peaks[name])
    return timings
