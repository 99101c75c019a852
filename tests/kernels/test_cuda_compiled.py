"""What nvcc makes of the CUDA sources for each architecture: no spills, no local memory, the instructions that should be there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
# what has to appear in the machine code of a source
INSTRUCTIONS = {"qk_norm_rope": ("LDG.E.128", "STG.E.128")}


def disassembler() -> str | None:
    """From the CUDA toolkit, or from Triton, which carries one."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump" if spec else None
    return shutil.which("cuobjdump") or (str(carried) if carried and carried.exists() else None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", sorted(INSTRUCTIONS))
def test_machine_code(source, architecture, tmp_path):
    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    command = [
        *("nvcc", "-cubin", "-std=c++17", "-O3", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas=-v"),
        *("-I", str(CSRC / "include"), str(CSRC / "cuda" / f"{source}.cu"), "-o", str(cubin)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", result.stderr)]
    assert usage and all(numbers == ("0", "0", "0") for numbers in usage), result.stderr
    assert max(registers) <= 64, registers  # 256 threads, four blocks to a multiprocessor
    code = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert all(instruction in code for instruction in INSTRUCTIONS[source])
    print(f"{source} sm_{architecture}: {len(registers)} kernels, at most {max(registers)} registers, 0 spilled")
