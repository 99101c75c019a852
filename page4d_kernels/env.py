"""All environment variables of the project in one table. Each op adds its variable when its backends are declared."""

from __future__ import annotations

import os

VARIABLES: dict[str, str] = {
    "PAGE4D_BUILD_EXT": "while installing: build the compiled library? auto (default: if it can be), 1 (or fail), 0",
    "PAGE4D_BUILD_CUDA": "while installing: with CUDA kernels? auto (default: if nvcc is there and compiles them), 1 (or fail), 0",
    "PAGE4D_CUDA_ARCHS": "while installing: compute capabilities of the CUDA kernels, separated by commas (default 80,90a)",
    "PAGE4D_CPU_LEVEL": "highest instruction set of the compiled CPU kernels: scalar, avx2, avx512, avx512_bf16, amx (default: the best)",
    "PAGE4D_AUTOTUNE": "time tile sizes of the Triton kernels on first use: off (default), fast (what no table has), full",
    "PAGE4D_AUTOTUNE_TABLE": "file of tile sizes, read before the shipped one; new timings are added to it",
    "PAGE4D_QUALIFY": "auto (default): `page4d infer` judges the backends once per device, and auto follows the record; off: neither",
    "PAGE4D_DEADLINE": "several processes: seconds that one of them waits for another before all end (default 300)",
    "PAGE4D_NVTX": "1: mark every stage with an NVTX range for Nsight (default 0)",
    "PAGE4D_DEBUG": "1: check the promises of callers (finite bias, gate zero outside special tokens); synchronises the device (default 0)",
}


class VariableError(ValueError):
    """An environment variable has an invalid value."""


def get(name: str, default: str = "") -> str:
    """The variable's value, stripped; `name` must be in the table."""
    if name not in VARIABLES:
        raise KeyError(f"{name} is not in the table of environment variables")
    return os.environ.get(name, default).strip()


def flag(name: str) -> bool:
    """True for 1, true, yes, on; False for 0, false, no, off and unset; anything else is an error."""
    value = get(name, "0").lower()
    if value in {"1", "true", "yes", "on"}:
        return True
    if value in {"", "0", "false", "no", "off"}:
        return False
    raise VariableError(f"{name}={value!r} is not a switch: use 0 or 1")
