"""Tile sizes of the attention kernels, by matrix unit (`target.matrix_unit`), dtype, head dim and kernel.

A tile is rows, keys, warps, pipeline stages, and 1 where warps are specialised: some load and multiply, the others compute the softmax. On
sm_100 Triton does that if both loops of the forward ask for it; it aborts if only the main loop does. Kernels with a biased loop have
lists of their own: `_packed` for the gated rows, `_checked` for the contiguous rows of a call without a layout.

The first of a list is the built-in choice, made from the machine code, not yet by measurement. Rules, in this order: nothing spills, on any
target of the matrix unit; most own rows (dkv: keys) in flight per multiprocessor; two programs rather than one, so that one's softmax runs
while the other multiplies; fewest reads of shared memory, which limit the forward on mma targets unless each warp owns 32 rows.
"""

from __future__ import annotations

import torch

from . import autotune
from .target import matrix_unit

NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "SPECIALISED")
PASSED = 3072  # bytes of shared memory for barriers and for vectors that pass between layouts

Tiles = dict[str, list[tuple[int, ...]]]

HALF: dict[str, Tiles] = {  # float16 and bfloat16, head dims up to 64
    "mma": {
        "fwd_kernel": [(128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
        "fwd_kernel_checked": [(128, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)],
        "fwd_kernel_packed": [(64, 64, 4, 3), (32, 64, 4, 3)],
        "bwd_kernel_dq": [(64, 64, 4, 2), (64, 32, 4, 3)],
        "bwd_kernel_dq_checked": [(64, 64, 4, 2), (64, 32, 4, 3)],
        "bwd_kernel_dq_packed": [(64, 64, 4, 3), (32, 64, 4, 3)],
        "bwd_kernel_dkv": [(64, 64, 4, 2), (32, 64, 4, 2)],
    },
    "wgmma": {
        "fwd_kernel": [(128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2)],
        "fwd_kernel_checked": [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)],
        "fwd_kernel_packed": [(64, 64, 4, 3), (64, 64, 4, 2)],
        "bwd_kernel_dq": [(64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 64, 8, 2)],
        "bwd_kernel_dq_checked": [(64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2)],
        "bwd_kernel_dq_packed": [(64, 64, 4, 2), (64, 64, 4, 3)],
        "bwd_kernel_dkv": [(64, 64, 4, 2), (32, 64, 4, 2), (64, 128, 8, 2), (64, 64, 8, 2)],
    },
    "tcgen05": {
        "fwd_kernel": [(128, 64, 4, 3, 1), (128, 64, 8, 3), (128, 64, 4, 4, 1), (128, 64, 4, 3), (64, 64, 4, 3)],
        "fwd_kernel_checked": [(128, 64, 8, 3), (128, 64, 8, 2)],
        "fwd_kernel_packed": [(64, 64, 4, 3), (64, 64, 4, 2)],
        "bwd_kernel_dq": [(64, 64, 4, 2), (64, 64, 8, 2)],
        "bwd_kernel_dq_checked": [(64, 64, 4, 2), (64, 64, 8, 2)],
        "bwd_kernel_dq_packed": [(64, 64, 4, 2), (64, 64, 8, 2)],
        "bwd_kernel_dkv": [(64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 4, 2)],
    },
    "mfma": {
        "fwd_kernel": [(128, 64, 4, 1)],
        "fwd_kernel_checked": [(64, 32, 4, 1)],
        "fwd_kernel_packed": [(64, 64, 4, 1)],
        "bwd_kernel_dq": [(64, 32, 4, 1)],
        "bwd_kernel_dq_checked": [(64, 32, 4, 1)],
        "bwd_kernel_dq_packed": [(64, 32, 4, 1)],
        "bwd_kernel_dkv": [(32, 64, 4, 1)],
    },
}
WIDE: dict[str, Tiles] = {  # float16 and bfloat16, head dims over 64
    "mma": {
        "fwd_kernel": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)],
        "fwd_kernel_checked": [(128, 64, 8, 2), (64, 32, 4, 3)],
        "fwd_kernel_packed": [(64, 32, 4, 2)],
        "bwd_kernel_dq": [(64, 64, 8, 2), (64, 32, 4, 2)],
        "bwd_kernel_dq_checked": [(64, 64, 8, 2)],
        "bwd_kernel_dq_packed": [(64, 64, 8, 2)],
        "bwd_kernel_dkv": [(64, 64, 8, 2), (64, 32, 8, 2)],
    },
    "wgmma": {
        "fwd_kernel": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)],
        "fwd_kernel_checked": [(128, 64, 8, 3), (64, 64, 4, 2)],
        "fwd_kernel_packed": [(64, 64, 4, 2)],
        "bwd_kernel_dq": [(64, 64, 4, 2), (64, 64, 8, 2)],
        "bwd_kernel_dq_checked": [(64, 64, 8, 2)],
        "bwd_kernel_dq_packed": [(64, 64, 8, 2)],
        "bwd_kernel_dkv": [(64, 64, 8, 2), (32, 64, 4, 2)],
    },
    "tcgen05": {
        "fwd_kernel": [(128, 64, 8, 3), (128, 64, 8, 2, 1), (128, 64, 8, 2)],
        "fwd_kernel_checked": [(128, 64, 8, 2)],
        "fwd_kernel_packed": [(64, 64, 8, 2)],
        "bwd_kernel_dq": [(64, 64, 8, 2), (64, 64, 4, 2)],
        "bwd_kernel_dq_checked": [(64, 64, 8, 2)],
        "bwd_kernel_dq_packed": [(64, 64, 8, 2)],
        "bwd_kernel_dkv": [(64, 64, 8, 2), (32, 64, 4, 2)],
    },
    "mfma": {
        "fwd_kernel": [(64, 32, 4, 1)],
        "fwd_kernel_packed": [(64, 32, 4, 1)],
        "bwd_kernel_dq": [(32, 32, 4, 1)],
        "bwd_kernel_dq_packed": [(32, 32, 4, 1)],
        "bwd_kernel_dkv": [(32, 32, 4, 1)],
    },
}
FP32: dict[str, Tiles] = {  # float32, head dims up to 64
    "mma": {
        "fwd_kernel": [(64, 32, 8, 2)],
        "fwd_kernel_checked": [(32, 32, 8, 2)],
        "fwd_kernel_packed": [(32, 32, 8, 2)],
        "bwd_kernel_dq": [(32, 32, 4, 1), (32, 32, 4, 2)],
        "bwd_kernel_dq_checked": [(32, 32, 8, 1)],
        "bwd_kernel_dq_packed": [(32, 32, 8, 1)],
        "bwd_kernel_dkv": [(32, 32, 4, 1)],
    },
    "wgmma": {
        "fwd_kernel": [(64, 32, 4, 2), (64, 32, 8, 2)],
        "fwd_kernel_checked": [(64, 32, 4, 2)],
        "fwd_kernel_packed": [(64, 32, 4, 2)],
        "bwd_kernel_dq": [(32, 32, 4, 1), (64, 32, 8, 1)],
        "bwd_kernel_dq_checked": [(32, 32, 4, 1)],
        "bwd_kernel_dq_packed": [(32, 32, 4, 1)],
        "bwd_kernel_dkv": [(32, 32, 4, 1)],
        "bwd_kernel_dkv_checked": [(32, 32, 8, 1)],
    },
    "tcgen05": {
        "fwd_kernel": [(64, 32, 4, 2), (64, 32, 8, 2)],
        "fwd_kernel_checked": [(64, 32, 8, 2)],
        "fwd_kernel_packed": [(64, 32, 8, 2)],
        "bwd_kernel_dq": [(32, 32, 4, 1)],
        "bwd_kernel_dq_checked": [(32, 32, 4, 1)],
        "bwd_kernel_dq_packed": [(32, 32, 4, 1)],
        "bwd_kernel_dkv": [(32, 32, 8, 1)],
    },
    "mfma": {
        "fwd_kernel": [(64, 32, 4, 1)],
        "fwd_kernel_checked": [(64, 32, 4, 1)],
        "fwd_kernel_packed": [(64, 32, 4, 1)],
        "bwd_kernel_dq": [(32, 32, 4, 1)],
        "bwd_kernel_dq_checked": [(32, 32, 4, 1)],
        "bwd_kernel_dq_packed": [(32, 32, 4, 1)],
        "bwd_kernel_dkv": [(32, 32, 4, 1)],
    },
}
FP32_WIDE: dict[str, Tiles] = {  # float32, head dims over 64: tf32x3 holds operands in two parts, so a program owns few rows
    unit: {
        "fwd_kernel": [(32, 32, 8, 2)] if unit == "mma" else [(32, 32, 4, 2)],
        "fwd_kernel_checked": [(16, 32, 4, 2)],
        "fwd_kernel_packed": [(16, 32, 4, 2)],
        "bwd_kernel_dq": [(16, 16, 8, 1)],
        "bwd_kernel_dq_packed": [(16, 16, 8, 1)],
        "bwd_kernel_dkv": [(32, 16, 8, 1)],
    }
    for unit in ("mma", "wgmma", "tcgen05")
}
FP32_WIDE["mfma"] = {
    "fwd_kernel": [(32, 32, 8, 1)],
    "fwd_kernel_checked": [(16, 32, 4, 1)],
    "fwd_kernel_packed": [(16, 32, 4, 1)],
    "bwd_kernel_dq": [(32, 32, 4, 1)],
    "bwd_kernel_dq_packed": [(32, 32, 4, 1)],
    "bwd_kernel_dkv": [(32, 32, 4, 1)],
}


def resources(kernel: str, head_dim: int, dtype: torch.dtype, config: autotune.Config) -> autotune.ResourceEstimate:
    """What the compiler asks for at most, as seen in compiled kernels.

    Shared memory: the loop's two tiles once per stage, the program's own tiles, logits that pass between layouts. mfma reads its own tiles
    from registers, mma at least one of them. tf32x3 holds operands in two parts. Registers: accumulators, and logits (and their gradient).
    """
    rows, keys, size, fp32, unit = config["BLOCK_M"], config["BLOCK_N"], dtype.itemsize, dtype == torch.float32, matrix_unit()
    forward, owns_keys = kernel.startswith("fwd"), "dkv" in kernel
    own, looped = (keys, rows) if owns_keys else (rows, keys)
    stages = config["num_stages"]
    if unit in ("wgmma", "tcgen05"):
        stages += 2 if fp32 else 1 if unit == "tcgen05" and not forward else 0
    kept = 0 if unit == "mfma" else own * ((1 if forward else 2) - (unit == "mma" and not fp32))
    logits = (1 if forward else 2) * (4 if fp32 and unit != "mfma" else 1)
    shared = (2 * looped * stages + kept) * head_dim * size + logits * rows * keys * size + PASSED
    return autotune.ResourceEstimate(shared, (2 if owns_keys else 1) * own * head_dim + (1 if forward else 2) * rows * keys)


def candidates(kernel: str, mode: str, head_dim: int, dtype: torch.dtype) -> list[autotune.Config]:
    """Configurations of `kernel` in a call whose rows see the bias as `mode` says: plain, packed or checked."""
    narrow, wide = (FP32, FP32_WIDE) if dtype == torch.float32 else (HALF, WIDE)
    tiles = (narrow if head_dim <= 64 else wide)[matrix_unit()]
    configs = [dict(zip(NAMES, tile, strict=False)) for tile in tiles.get(f"{kernel}_{mode}", tiles[kernel])]
    return autotune.prune(configs, lambda config: resources(kernel, head_dim, dtype, config))
