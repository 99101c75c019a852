"""Compile kernels without a GPU: `python -m page4d_kernels.triton.dryrun > docs/triton_resources.md` lists their resources.

A stand-in for Triton's NVIDIA driver lets CPU tensors pass through the real launch path. Kernels are specialised and compiled to machine
code. The launch is recorded instead of run. Does not work with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import launcher

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "MUFU.EX2", "STL", "LDL")
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a program may use
RESERVED = 1024  # bytes of shared memory that the driver takes for each program; a multiprocessor has those of one program and these
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # that a multiprocessor holds
REGISTERS, TENSOR_MEMORY = 65536, 512  # of a multiprocessor: 32-bit registers, columns of tensor memory (sm_100)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]


class DryRunDriver:
    """The part of the driver that the launch path uses."""

    binary_ext = "cubin"

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = self
        self.launches: list[Launch] = []

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton caches compiled kernels per device, so each capability is a device

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: Any) -> dict[str, int]:
        shared = SHARED_MEMORY[self.target.arch]
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Any, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, maximum threads

    def unload_module(self, *args: Any) -> None:
        pass

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launch(grid_x: int, grid_y: int, grid_z: int, *args: Any, **kwargs: Any) -> None:
            driver.active.launches.append(Launch(metadata.name, (grid_x, grid_y, grid_z)))  # `active`: compiled kernels outlive a dry run

        return launch


@contextlib.contextmanager
def dry_run(capability: int) -> Iterator[DryRunDriver]:
    """Inside the block, launches compile for `capability` and are recorded."""
    stand_in = DryRunDriver(capability)
    before = driver._active  # reading `active` would look for a GPU
    driver.set_active(stand_in)
    try:
        yield stand_in
    finally:
        driver._active = before


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel, and how often each of `INSTRUCTIONS` occurs in its machine code."""

    registers: int  # per thread
    stack: int  # bytes of local memory per thread; 0 means no spills
    shared: int  # bytes per program
    programs: int  # that a multiprocessor holds at a time
    instructions: dict[str, int]


def programs(capability: int, registers: int, shared: int, warps: int, tensor_memory: int) -> int:
    """Programs per multiprocessor. A warp's registers are handed out in units of 256."""
    by_registers = REGISTERS // (math.ceil(32 * registers / 256) * 256 * warps)
    by_shared = (SHARED_MEMORY[capability] + RESERVED) // (shared + RESERVED)
    return min(by_registers, by_shared, WARPS[capability] // warps, TENSOR_MEMORY // max(tensor_memory, 1))


def resources(kernel: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(flag: str) -> str:
            return subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in INSTRUCTIONS}
    needs = kernel.metadata
    count = programs(needs.target.arch, numbers["REG"], needs.shared, needs.num_warps, getattr(needs, "tmem_size", None) or 0)
    return Resources(numbers["REG"], numbers["STACK"], needs.shared, count, counts)


@contextlib.contextmanager
def compiled_kernels() -> Iterator[dict[str, Any]]:
    """The kernels launched inside the block, compiled, by name."""
    found: dict[str, Any] = {}
    original = triton.runtime.jit.JITFunction.run

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        found[self.fn.__name__] = kernel
        return kernel

    triton.runtime.jit.JITFunction.run = run
    launcher.forget()  # so that every launch passes through it
    try:
        yield found
    finally:
        triton.runtime.jit.JITFunction.run = original


def entry_points() -> dict[str, Callable[[], None]]:
    """The `examples` of all launch modules by name: every launch at the official sizes (10 frames of 24 x 37 patches)."""
    from ..backends.registry import registries

    found: dict[str, Callable[[], None]] = {}
    for op, registry in registries().items():
        if any(backend.name == "triton" for backend in registry):
            found |= importlib.import_module(f"page4d_kernels.triton.{op}_launch").examples()
    return found


def table() -> str:
    """The page docs/triton_resources.md: the resources of every kernel with its built-in tiles."""
    columns = ["target", "op", "kernel", "registers", "spilled bytes", "shared bytes", *INSTRUCTIONS[:4]]
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Triton {triton.__version__}, official sizes, built-in tiles, attention at head dim 64 in bf16. Compiled ahead of time, not run",
        "on a GPU. Registers are per thread, shared memory is per program. The last columns count instructions. This page is the output of",
        "`python -m page4d_kernels.triton.dryrun`.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for capability in SHARED_MEMORY:
        for op, launch in entry_points().items():
            with dry_run(capability), compiled_kernels() as kernels:
                launch()
            for name, kernel in kernels.items():
                needs = resources(kernel)
                counts = [needs.instructions[instruction] for instruction in INSTRUCTIONS[:4]]
                cells = [f"sm_{capability}", op, name, needs.registers, needs.stack, needs.shared, *counts]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
