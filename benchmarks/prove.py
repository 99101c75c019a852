"""Everything about the GPU kernels that needs a GPU, in under nine minutes: `python -m benchmarks.prove OUT`.

Builds the CUDA kernels, runs `pytest -m gpu` (compute-sanitizer included), times the tile sizes of every Triton kernel
(PAGE4D_AUTOTUNE=full), then measures the benchmark cases with them, and leaves tests.xml, tiles.json and results.json in the folder OUT.
A step that runs out of its time is cut off and the next one goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

STEPS = {"build": 90, "tests": 240, "benchmarks": 200}  # seconds


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.prove OUT", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: there is no CUDA device here", file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    tests, results, tiles = (str(out / name) for name in ("tests.xml", "results.json", "tiles.json"))
    cases = ["mask_attention-*-?0x893-bfloat16", "mask_attention-*-100x893-bfloat16", "mask_head-*-bfloat16", "*_norm*-bfloat16"]
    cases += ["block-*-40x893-bfloat16", "model-forward-?0x893-bfloat16"]
    commands = {
        "build": ["setup.py", "build_ext", "--inplace"],
        "tests": ["-m", "pytest", "-m", "gpu", "--timeout=120", f"--junitxml={tests}", "tests/kernels"],
        "benchmarks": ["-m", "benchmarks", "run", "--cases", *cases, "--seconds", "2", "--out", results],
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
        print(f"{name}: {'out of time' if code == -1 else f'exit {code}'} after {time.monotonic() - start:.0f} s", flush=True)
        failed |= code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
