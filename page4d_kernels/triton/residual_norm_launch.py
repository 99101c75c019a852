"""Launch of the residual + LayerNorm kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from . import autotune, launcher
from . import residual_norm as kernels
from .launcher import cdiv, next_power_of_2
from .target import per_target

T = TypeVar("T")
# Rows and warps. The first is the built-in choice. Not yet measured on a GPU.
TILES = [(4, 8), (4, 4), (1, 4), (8, 8), (1, 2)]
PROGRAMS = 512  # maximum in the backward: a few per multiprocessor, each with one row of sums


def _blocks(channels: int) -> dict[str, int]:
    return {"C": channels, "BLOCK_C": next_power_of_2(channels)}


def resources(channels: int, config: autotune.Config) -> autotune.ResourceEstimate:
    """Shared memory: sums over rows pass between warps. A program holds about six blocks of values."""
    block_c = next_power_of_2(channels)
    return autotune.ResourceEstimate(2 * block_c * config["num_warps"] + 1024, 6 * config["BLOCK_N"] * block_c)


def candidates(channels: int) -> list[autotune.Config]:
    """Long rows reduce the number of rows per program."""
    long = next_power_of_2(channels) // 1024
    configs = [{"BLOCK_N": max(1, rows // max(1, long)), "num_warps": warps} for rows, warps in TILES]
    return autotune.prune(configs, lambda config: resources(channels, config))


@per_target
def _tuning(kernel: str, channels: int, dtype: torch.dtype) -> tuple[str, list[autotune.Config]]:
    return autotune.key(f"residual_norm_{kernel}", f"C{next_power_of_2(channels)}", dtype), candidates(channels)


def _launch(kernel: str, x: Tensor, run: Callable[[autotune.Config], T]) -> T:
    key, configs = _tuning(kernel, x.shape[-1], x.dtype)
    return run(autotune.choose(key, configs, run))


def forward(
    x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x, branch, scale, weight, bias = (tensor.contiguous() for tensor in (x, branch, scale, weight, bias))
    total, normal = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    rows = x.numel() // x.shape[-1]

    def run(config: autotune.Config) -> None:
        launcher.launch(
            kernels.residual_norm_fwd_kernel, (cdiv(rows, config["BLOCK_N"]),),
            (x, branch, scale, weight, bias, total, normal), (rows, eps), **_blocks(x.shape[-1]), **config,
        )  # fmt: skip

    _launch("fwd_kernel", x, run)
    return total, normal


def backward(
    d_total: Tensor, d_normal: Tensor, total: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = [tensor.contiguous() for tensor in (d_total, d_normal, total, branch, scale, weight)]
    d_x, d_branch = torch.empty_like(tensors[2]), torch.empty_like(tensors[3])
    channels = total.shape[-1]
    rows = total.numel() // channels

    def run(config: autotune.Config) -> Tensor:
        all_tiles = cdiv(rows, config["BLOCK_N"])
        tiles = cdiv(all_tiles, PROGRAMS)
        programs = cdiv(all_tiles, tiles)
        sums = torch.empty(3, programs, channels, dtype=torch.float32, device=total.device)
        launcher.launch(
            kernels.residual_norm_bwd_kernel, (programs,),
            (*tensors, d_x, d_branch, sums), (sums.stride(0), rows, tiles, eps), **_blocks(channels), **config
        )  # fmt: skip
        return sums

    sums = _launch("bwd_kernel", total, run)
    d_scale, d_weight, d_bias = (part.sum(0).to(x.dtype) for part, x in zip(sums, (scale, weight, weight), strict=True))
    return d_x, d_branch, d_scale, d_weight, d_bias


def example(dtype: torch.dtype = torch.bfloat16, channels: int = 1024) -> None:
    """Forward and backward at the official size (10 frames of 893 tokens, 1024 channels), for dry runs."""
    x, branch, vector = torch.empty(1, 10 * 893, channels), torch.empty(1, 10 * 893, channels, dtype=dtype), torch.empty(channels)
    total, normal = forward(x, branch, vector, vector, vector, 1e-5, dtype)
    backward(x, normal, total, branch, vector, vector, 1e-5)


def examples() -> dict[str, Callable[[], None]]:
    return {"residual + norm": example}
