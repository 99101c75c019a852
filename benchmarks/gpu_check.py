"""Check the GPU kernels on a machine with a GPU, in under nine minutes: `python -m benchmarks.gpu_check OUT`.

1. Build the CUDA kernels.
2. Run `pytest -m gpu`, which includes compute-sanitizer.
3. Time the tile sizes of every Triton kernel (PAGE4D_AUTOTUNE=full) and measure the benchmark cases with the best ones.

The folder OUT receives tests.xml, tiles.json and results.json. A step that exceeds its time limit is stopped, and the next one starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from .bandwidth_ops import BANDWIDTH_OPS

STEPS = {"build": 90, "tests": 240, "benchmarks": 200}  # time limits in seconds
CASES = [
    "mask_attention-*-?0x893-bfloat16",
    "mask_attention-*-100x893-bfloat16",
    *(f"{op}-*-bfloat16" for op in BANDWIDTH_OPS),
    "block-*-40x893-bfloat16",
    "model-forward-?0x893-bfloat16",
]


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.gpu_check OUT", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here", file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    tests, results, tiles = (str(out / name) for name in ("tests.xml", "results.json", "tiles.json"))
    commands = {
        "build": ["setup.py", "build_ext", "--inplace"],
        "tests": ["-m", "pytest", "-m", "gpu", "--timeout=120", f"--junitxml={tests}", "tests/kernels"],
        "benchmarks": ["-m", "benchmarks", "run", "--cases", *CASES, "--seconds", "2", "--out", results],
    }
    tuned = {"PAGE4D_AUTOTUNE": "full", "PAGE4D_AUTOTUNE_TABLE": tiles}
    failed = 0
    for name, seconds in STEPS.items():
        start = time.monotonic()
        try:
            environment = os.environ | (tuned if name == "benchmarks" else {})
            code = subprocess.run([sys.executable, *commands[name]], timeout=seconds, env=environment).returncode
        except subprocess.TimeoutExpired:
            code = -1
        print(f"{name}: {'time limit exceeded' if code == -1 else f'exit code {code}'} after {time.monotonic() - start:.0f} s", flush=True)
        failed |= code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
