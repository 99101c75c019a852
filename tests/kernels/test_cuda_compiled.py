"""The machine code that nvcc generates for each architecture: no spills, no local memory, and the expected instructions."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
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
        check_attention(code, result.stderr)


# Of the attention kernels, by head dim: registers at launch, and of a thread of the producer and of a consumer after setmaxnreg. A consumer
# waits until the producer's registers suffice. With other counts at launch it would wait forever.
REGISTERS = {64: (128, 32, 160), 128: (168, 24, 240)}
# At most so many instructions in a round of the loop without a bias, by head dim and polynomial share (what ptxas 13.0 made, and 2 %).
LOOP = {(64, 8): 456, (64, 16): 424, (64, 0): 390, (128, 0): 400}


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # with its predicate
    stall: int  # clocks before the warp may issue its next instruction

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+ +", "", self.text).split()[0]


def instructions(kernel: str) -> list[Instruction]:
    """Of one kernel in the output of cuobjdump, where each instruction is followed by the lower and the upper half of its encoding."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.+?) *;.*?/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/", kernel)
    return [Instruction(int(address, 16), text, int(high, 16) >> 41 & 15) for address, text, high in found]


def main_loop(kernel: list[Instruction]) -> list[Instruction]:
    """The loop without a bias: the one that waits for q k^T while p v goes on."""
    loops = []
    for last in kernel:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", last.text)
        if target and int(target[1], 16) <= last.address:
            body = [x for x in kernel if int(target[1], 16) <= x.address <= last.address]
            if any("DEPBAR.LE gsb0, 0x1" in x.text for x in body):
                loops.append(body)
    return min(loops, key=len)


def common_path(loop: list[Instruction]) -> list[Instruction]:
    """Without what branches jump over: sums are rescaled in few rounds."""
    skipped: set[int] = set()
    for branch in loop:
        target = re.match(r"@!?U?P\d+ BRA\b.* 0x([0-9a-f]+)", branch.text)
        if target and branch.address < int(target[1], 16) <= loop[-1].address:
            skipped |= {x.address for x in loop if branch.address < x.address < int(target[1], 16)}
    return [x for x in loop if x.address not in skipped]


def count(found: list[Instruction]) -> Counter[str]:
    return Counter(x.name.split(".")[0] for x in found)


def check_attention(code: str, ptxas: str) -> None:
    usage = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", ptxas, re.DOTALL))
    kernels = [part for part in code.split("Function : ")[1:] if "_merge" not in part.splitlines()[0]]
    assert len(kernels) == 2 * len(LOOP)  # two dtypes
    for kernel in kernels:
        name = kernel.splitlines()[0].strip()
        dim, polynomial = map(int, re.search(r"Li(\d+)ELi(\d+)E", name).groups())
        at_launch, producer, consumer = REGISTERS[dim]
        assert int(usage[name]) == at_launch
        assert [int(n, 16) for n in re.findall(r"USETMAXREG\.DEALLOC\S+ (0x\w+)", kernel)] == [producer]
        assert [int(n, 16) for n in re.findall(r"USETMAXREG\.TRY_ALLOC\S+ UP\d, (0x\w+)", kernel)] == [consumer]
        # the roles meet at the start and at the end, or ptxas would not give each its own registers
        assert len(re.findall(r"BAR\.SYNC\S* 0x0 ", kernel)) == 2

        loop = main_loop(instructions(kernel))
        waits = [i for i, x in enumerate(loop) if "DEPBAR.LE" in x.text]
        assert [loop[i].text.split()[-1] for i in waits] == ["0x1", "0x0"]
        # the exponentials run under a wgmma: they come between the wait for q k^T and the wait for p v
        exponentials = 64 - 64 // polynomial if polynomial else 64
        assert count(loop[waits[0] : waits[1]])["MUFU"] >= exponentials

        path = common_path(loop)
        counts = count(path)
        assert counts["MUFU"] == exponentials and counts["R2UR"] <= 2 and len(path) <= LOOP[dim, polynomial], counts
        shown = ", ".join(f"{counts[name]} {name}" for name in ("R2UR", "FADD", "FMUL", "FFMA", "FMNMX", "MUFU", "HGMMA", "BAR", "SYNCS"))
        print(f"{name}: {len(loop)} in the loop, {len(path)} on the common path: {shown}; stalls {sum(x.stall for x in path)}")
