"""Check the GPU kernels on a machine with a GPU, in under nine minutes: `python -m benchmarks.gpu_check OUT`.

1. Build the CUDA kernels.
2. Qualify every backend: `page4d qualify`, for bf16, forward and training.
3. Run `pytest -m gpu`, without fp32, whose kernels take half a minute each to compile.
4. Measure the benchmark cases with the best tile sizes (PAGE4D_AUTOTUNE=fast).
5. Time the attention plans.

The folder OUT receives cache/page4d/*.json (the record), qualification.txt, tests.xml, tiles.json, results.json and plans.json. A step
that exceeds its time limit is stopped, and the next one starts.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from .bandwidth_ops import BANDWIDTH_OPS

STEPS = {"build": 90, "qualify": 150, "tests": 150, "benchmarks": 100, "plans": 50}  # time limits in seconds
CASES = [
    "mask_attention-*-?0x893-bfloat16",
    "mask_attention-*-100x893-bfloat16",
    *(f"{op}-*-bfloat16" for op in BANDWIDTH_OPS),
    "block-*-40x893-bfloat16",
    "model-forward-?0x893-bfloat16",
]


def commands(out: Path) -> dict[str, list[str]]:
    """The arguments of Python, by step."""
    tests = ["-m", "pytest", "-m", "gpu", "-k", "not float32", "--timeout=120", f"--junitxml={out / 'tests.xml'}", "tests/kernels"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", "4"]  # most of the time goes to the compiler, on the CPU
    return {
        "build": ["setup.py", "build_ext", "--inplace"],
        "qualify": ["-m", "page4d_kernels.qualify", "--force", "--dtypes", "bfloat16", "--seconds", str(STEPS["qualify"] - 20)],
        "tests": tests,
        "benchmarks": ["-m", "benchmarks", "run", "--cases", *CASES, "--seconds", "1", "--out", str(out / "results.json")],
        "plans": ["-m", "benchmarks.plan_time", "--device", "cuda", "--frames", "40,100", "--json", str(out / "plans.json")],
    }


def run(arguments: list[str], seconds: float, environment: dict[str, str], log: Path | None) -> int:
    """The exit code; -1 if the time limit was exceeded. Children of the step end with it."""
    with open(log, "w") if log else open(os.devnull) as file:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=file if log else None, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return -1


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.gpu_check OUT", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here", file=sys.stderr)
        return 2
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    tiles = str(out / "tiles.json")
    environment = os.environ | {"PAGE4D_BUILD_CUDA": "1", "XDG_CACHE_HOME": str(out / "cache"), "PAGE4D_AUTOTUNE_TABLE": tiles}
    failed = 0
    for name, arguments in commands(out).items():
        start = time.monotonic()
        tuned = {"PAGE4D_AUTOTUNE": "fast"} if name in ("benchmarks", "plans") else {}
        code = run(arguments, STEPS[name], environment | tuned, out / "qualification.txt" if name == "qualify" else None)
        print(f"{name}: {'time limit exceeded' if code == -1 else f'exit code {code}'} after {time.monotonic() - start:.0f} s", flush=True)
        failed |= code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
