"""The machine code that nvcc generates for each architecture: no spills, no local memory, and the expected instructions."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


@dataclass(frozen=True)
class Plan:
    """The registers that a source may use and the instructions that its machine code must contain."""

    registers: int
    instructions: tuple[str, ...]
    architectures: tuple[str, ...] = ("80", "90a")


PLANS = {
    "qk_norm_rope": Plan(64, ("LDG.E.128", "STG.E.128")),  # 256 threads, four blocks per multiprocessor
    "mask_head": Plan(128, ("LDG.E.128", "LDGSTS.E.BYPASS.128", "HMMA.1688.F32.TF32")),  # 512 threads, one block
    # registers at launch; 384 and 512 threads, one block: consumers raise them to 240 and 160
    "mask_attention_sm90": Plan(168, ("HGMMA.64x128x16.F32", "HGMMA.64x64x16.F32", "UTMALDG.4D", "UTMALDG.5D", "USETMAXREG"), ("90a",)),
}


def disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton includes."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump" if spec else None
    return shutil.which("cuobjdump") or (str(carried) if carried and carried.exists() else None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("source", "architecture"), [(name, arch) for name, plan in PLANS.items() for arch in plan.architectures])
def test_machine_code(source, architecture, tmp_path):
    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump")
    cubin, plan = tmp_path / "kernel.cubin", PLANS[source]
    command = [
        *("nvcc", "-cubin", "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v"),
        *("-I", str(CSRC / "include"), str(CSRC / "cuda" / f"{source}.cu"), "-o", str(cubin)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", result.stderr)]
    assert usage and all(numbers == ("0", "0", "0") for numbers in usage), result.stderr
    assert max(registers) <= plan.registers, registers
    assert not re.search(r"C75\d\d", result.stderr), result.stderr  # ptxas serialises the wgmmas, or ignores setmaxnreg
    code = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert all(instruction in code for instruction in plan.instructions)
    assert not re.search(r"\b(LDL|STL)\b", code)  # local memory
    print(f"{source} sm_{architecture}: {len(registers)} kernels, at most {max(registers)} registers, 0 spilled")
    if source == "mask_attention_sm90":
        check_overlap(code)


def check_overlap(code: str) -> None:
    """The exponentials run under a wgmma. In each kernel's loop without a bias, the special-function unit computes 56 of the 64
    exponentials of a tile. They must come between the wait for q k^T and the wait for p v."""
    kernels = [part for part in code.split("Function : ")[1:] if "_merge" not in part.splitlines()[0]]
    assert len(kernels) == 4  # two dtypes, two head dims
    for kernel in kernels:
        loops = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1 (.*?)WARPGROUP\.DEPBAR\.LE gsb0, 0x0 ", kernel, re.DOTALL)
        assert len(loops) == 1 and loops[0].count("MUFU.EX2") >= 56, [loop.count("MUFU.EX2") for loop in loops]
