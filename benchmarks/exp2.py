"""The exp2 rate of a GPU, from chains of exp2 that stay in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHAIN, BLOCK, PROGRAMS = 1024, 1024, 4096
COUNT = float(CHAIN * BLOCK * PROGRAMS)  # of one launch


@triton.jit
def _chain(p_out, CHAIN: tl.constexpr, BLOCK: tl.constexpr):
    b_x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(CHAIN):
        b_x = tl.exp2(b_x - 1.0)
    tl.store(p_out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), b_x)


def launch() -> None:
    out = torch.empty(PROGRAMS * BLOCK, dtype=torch.float32, device="cuda")
    _chain[(PROGRAMS,)](out, CHAIN=CHAIN, BLOCK=BLOCK, num_warps=4)
