"""The measured peak rates of the device, start-up times, and what a measurement must name."""

from __future__ import annotations

import functools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from page4d_kernels import native
from page4d_kernels.timing import Clock
from page4d_kernels.versions import cpu_name, version

CHECKOUT = Path(__file__).resolve().parents[1]


def limits(device: str) -> dict[str, float]:
    """The measured peak rates of this device: matmuls by dtype (FLOP/s), copies (B/s, reads plus writes) and exp2 (1/s).

    On a CPU with the compiled library, `products_flops_*` (multiply-adds) and `exp2` are measured on registers, without memory traffic.
    """
    clock = Clock(device)
    size, bytes_, repeats = (8192, 1 << 30, 10) if device == "cuda" else (2048, 1 << 28, 10)

    def best(run: Callable[[], object]) -> float:
        run()
        return min(clock.seconds(run) for _ in range(repeats))

    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"matrix_flops_{str(dtype).removeprefix('torch.')}"] = 2.0 * size**3 / best(functools.partial(torch.matmul, a, b))
        if device == "cpu" and not native.why_missing() and (work := native.peak_rate(dtype)):
            found[f"products_flops_{str(dtype).removeprefix('torch.')}"] = work / best(functools.partial(native.peak_rate, dtype))
    source = torch.randint(0, 255, (bytes_,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return found | {"copy_bytes": 2.0 * bytes_ / best(lambda: target.copy_(source)), "exp2": _exp2_rate(best, device)}


def _exp2_rate(best: Callable[[Callable[[], object]], float], device: str) -> float:
    if device == "cpu" and not native.why_missing() and (work := native.peak_rate(torch.float32, exponentials=True)):
        return work / best(lambda: native.peak_rate(torch.float32, exponentials=True))
    if device != "cuda":
        x, y = torch.rand(1 << 17), torch.empty(1 << 17)  # small enough for the L2 caches, large enough for all threads
        return 100 * x.numel() / best(lambda: [torch.exp2(x, out=y) for _ in range(100)])
    from . import exp2

    return exp2.COUNT / best(exp2.launch)


def startup() -> dict[str, float]:
    """Seconds of each import, without the imports before it, and of a first call: medians of three fresh processes."""
    code = """
import time
t = [time.perf_counter()]
import torch; t.append(time.perf_counter())
import page4d_kernels; t.append(time.perf_counter())
import page4d; t.append(time.perf_counter())
x = torch.zeros(1, 1, 8, 8); page4d_kernels.mask_attention(x, x, x); t.append(time.perf_counter())
print(*(b - a for a, b in zip(t, t[1:])))
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    names = ("import torch", "import page4d_kernels", "import page4d", "first attention call")
    return {name: statistics.median(map(float, values)) for name, values in zip(names, zip(*runs, strict=True), strict=True)}


def provenance(device: str, command: str) -> dict[str, Any]:
    """What a measurement must name: device, platform, versions, commit, date and command."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=CHECKOUT)
        return result.stdout.strip() if result.returncode == 0 else "unknown"

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }
