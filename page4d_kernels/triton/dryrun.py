"""Compile kernels without a GPU: `python -m page4d_kernels.triton.dryrun > docs/triton_resources.md` lists their resources.

A stand-in for Triton's driver lets CPU tensors pass through the real launch path. Kernels are specialised and compiled to machine code.
The launch is recorded instead of run. Does not work with TRITON_INTERPRET=1.

A target is a compute capability (90) or the name of an AMD architecture ("gfx942"). On AMD a program is a workgroup, a multiprocessor a
compute unit, a warp a wavefront of 64, and shared memory LDS.
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
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "MUFU.EX2", "STL", "LDL")  # UTCHMMA: tcgen05.mma
SHARED_MEMORY: dict[int | str, int] = {  # bytes a program may use
    80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip
RESERVED = 1024  # bytes of shared memory that CUDA takes for each program; a multiprocessor has those of one program and these
WARPS: dict[int | str, int] = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48, "gfx942": 32, "gfx950": 32}  # on a multiprocessor
REGISTERS, TENSOR_MEMORY = 65536, 512  # of a multiprocessor: 32-bit registers, columns of tensor memory (sm_100)
SIMDS, SIMD_REGISTERS = 4, 512  # of an AMD compute unit: SIMDs, and the registers per lane of each, shared by its wavefronts


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]


class DryRunDriver:
    """The part of the driver that the launch path uses."""

    def __init__(self, target: int | str):
        amd = isinstance(target, str)
        self.target = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", target, 32)
        self.binary_ext = "hsaco" if amd else "cubin"
        self.utils = self
        self.launches: list[Launch] = []

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        return self.target.arch  # Triton caches compiled kernels per device, so each target is a device

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: Any) -> dict[str, int]:
        shared = SHARED_MEMORY.get(self.target.arch, 0)  # nothing fits a target that is not listed
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": self.target.warp_size}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Any, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, maximum threads

    def unload_module(self, *args: Any) -> None:
        pass

    def map_python_to_cpp_type(self, ty: str) -> str:
        name = "amd" if self.target.backend == "hip" else "nvidia"
        return importlib.import_module(f"triton.backends.{name}.driver").ty_to_cpp(ty)

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launch(grid_x: int, grid_y: int, grid_z: int, *args: Any, **kwargs: Any) -> None:
            driver.active.launches.append(Launch(metadata.name, (grid_x, grid_y, grid_z)))  # `active`: compiled kernels outlive a dry run

        return launch


@contextlib.contextmanager
def dry_run(target: int | str) -> Iterator[DryRunDriver]:
    """Inside the block, launches compile for `target` and are recorded."""
    stand_in = DryRunDriver(target)
    before = driver._active  # reading `active` would look for a GPU
    driver.set_active(stand_in)
    try:
        yield stand_in
    finally:
        driver._active = before


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel, and how often each of `INSTRUCTIONS` (of its vendor) occurs in its machine code."""

    registers: int  # per thread
    stack: int  # bytes of local memory per thread; 0 means no spills
    shared: int  # bytes per program
    programs: int  # that a multiprocessor holds at a time
    instructions: dict[str, int]


def _programs(target: int | str, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Programs per multiprocessor. Registers are handed out in units of 8 per thread."""
    registers = math.ceil(registers / 8) * 8
    if isinstance(target, str):
        return min(SIMD_REGISTERS // registers * SIMDS // warps, SHARED_MEMORY[target] // max(shared, 1), WARPS[target] // warps)
    by_registers = REGISTERS // (32 * registers * warps)
    by_shared = (SHARED_MEMORY[target] + RESERVED) // (shared + RESERVED)
    return min(by_registers, by_shared, WARPS[target] // warps, TENSOR_MEMORY // max(tensor_memory, 1))


def resources(kernel: Any) -> Resources:
    needs = kernel.metadata
    if needs.target.backend == "hip":
        code = kernel.asm["amdgcn"]
        numbers = {
            name: int(value) for name, value in re.findall(r"^ +\.(vgpr_count|private_segment_fixed_size): +(\d+)", code, re.MULTILINE)
        }
        registers, counts = numbers["vgpr_count"], {"MFMA": len(re.findall(r"\bv_mfma_", code))}
        count = _programs(needs.target.arch, registers, needs.shared, needs.num_warps)
        return Resources(registers, numbers["private_segment_fixed_size"], needs.shared, count, counts)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(flag: str) -> str:
            return subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in INSTRUCTIONS}
    count = _programs(needs.target.arch, numbers["REG"], needs.shared, needs.num_warps, getattr(needs, "tmem_size", None) or 0)
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
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Triton {triton.__version__}, official sizes, built-in tiles, attention at head dim 64 in bf16. Compiled ahead of time, not run",
        "on a GPU. Registers are per thread, shared memory is per program, programs are those that a multiprocessor holds at a time. The",
        "last columns count instructions. This page is the output of `python -m page4d_kernels.triton.dryrun`.",
    ]
    for target in SHARED_MEMORY:
        found: dict[tuple[str, str], Resources] = {}
        for op, launch in entry_points().items():
            with dry_run(target), compiled_kernels() as kernels:
                launch()
            found |= {(op, name): resources(kernel) for name, kernel in kernels.items()}
        shown = [name for name in (*INSTRUCTIONS, "MFMA") if any(needs.instructions.get(name) for needs in found.values())]
        columns = ["op", "kernel", "registers", "spilled bytes", "shared bytes", "programs", *shown]
        title = target if isinstance(target, str) else f"sm_{target}"
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for (op, name), needs in found.items():
            counts = [needs.instructions[instruction] for instruction in shown]
            lines.append(f"| {' | '.join(map(str, [op, name, needs.registers, needs.stack, needs.shared, needs.programs, *counts]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
