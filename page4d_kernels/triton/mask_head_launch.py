"""Launch of the mask head kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..reference.mask_head import MIN_STD
from . import autotune, launcher
from . import mask_head as fwd
from . import mask_head_backward as bwd
from .launcher import cdiv, next_power_of_2
from .target import capability, matrix_unit, per_target, precision

T = TypeVar("T")
STATISTICS_P, STATISTICS_C = 64, 32
SHARES = 16  # of the patch tiles, for weight gradients: more shares fill the GPU better but store more partial sums

# Patches, channels, warps, pipeline stages. The first is the built-in choice. Not yet measured on a GPU.
TILES = {"rows": [(32, 32, 8, 2), (16, 32, 4, 2)], "channels": [(32, 32, 8, 1), (32, 16, 8, 2)]}
FP32_TILES = {"rows": [(32, 32, 8, 2)], "channels": [(32, 16, 8, 2), (16, 32, 8, 1)]}
HOPPER_ROWS = (64, 32, 8, 2)  # wide enough for wgmma; Triton 3.7 aborts on it for sm_100


def _statistics(tokens: Tensor, patches: int, special_tokens: int) -> tuple[Tensor, Tensor]:
    batch, frames, _, channels = tokens.shape
    mean, rstd = (torch.empty(batch * frames, channels, dtype=torch.float32, device=tokens.device) for _ in range(2))
    launcher.launch(
        fwd.mask_head_fwd_kernel_stats, (batch * frames, cdiv(channels, STATISTICS_C)),
        (tokens, mean, rstd), (*tokens.stride(), frames, channels, special_tokens, patches, MIN_STD),
        BLOCK_P=STATISTICS_P, BLOCK_C=STATISTICS_C, num_warps=4,
    )  # fmt: skip
    return mean, rstd


def _weights(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.to(torch.float32).contiguous() for parameter in parameters]


def _block_h(hidden: int) -> int:
    return max(16, next_power_of_2(hidden))


def _constants(tokens: Tensor, hidden: int) -> dict[str, Any]:
    """Half-precision tokens carry no more digits than tf32, so one tf32 matmul is enough. fp32 tokens take three (tf32x3)."""
    return {"BLOCK_H": _block_h(hidden), "PRECISION": precision(tokens.dtype)}


def resources(kernel: str, dtype: torch.dtype, hidden: int, config: autotune.Config) -> autotune.ResourceEstimate:
    patches, block_c, stages = config["BLOCK_P"], config["BLOCK_C"], config["num_stages"]
    owner, terms = (block_c, 1) if kernel == "bwd_kernel_channels" else (patches, 3 if dtype == torch.float32 else 1)
    return autotune.ResourceEstimate((stages * block_c + patches) * hidden * 4, owner * hidden + terms * patches * block_c)


def candidates(kernel: str, dtype: torch.dtype, hidden: int) -> list[autotune.Config]:
    tiles = (FP32_TILES if dtype == torch.float32 else TILES)["channels" if kernel == "bwd_kernel_channels" else "rows"]
    if matrix_unit() == "mfma" and kernel == "bwd_kernel_channels":
        tiles = FP32_TILES["channels"]  # the others spill on AMD
    if capability() == 90 and kernel != "bwd_kernel_channels" and dtype != torch.float32:
        tiles = [*tiles, HOPPER_ROWS]
    configs = [dict(zip(("BLOCK_P", "BLOCK_C", "num_warps", "num_stages"), tile, strict=True)) for tile in tiles]
    return autotune.prune(configs, lambda config: resources(kernel, dtype, hidden, config))


@per_target
def _tuning(kernel: str, dtype: torch.dtype, hidden: int) -> tuple[str, list[autotune.Config]]:
    return autotune.key(f"mask_head_{kernel}", f"H{hidden}", dtype), candidates(kernel, dtype, hidden)


def _launch(kernel: str, tokens: Tensor, hidden: int, run: Callable[[autotune.Config], T]) -> T:
    key, configs = _tuning(kernel, tokens.dtype, _block_h(hidden))
    return run(autotune.choose(key, configs, run))


def forward(tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> Tensor:
    batch, frames, per_frame, channels = tokens.shape
    patches, hidden = grid[0] * grid[1], parameters[2].shape[0]
    statistics, weights = _statistics(tokens, patches, special_tokens), _weights(parameters)
    out = torch.empty(batch, frames * per_frame, dtype=torch.float32, device=tokens.device)

    def run(config: autotune.Config) -> None:
        launcher.launch(
            fwd.mask_head_fwd_kernel, (cdiv(patches, config["BLOCK_P"]), batch * frames),
            (tokens, *statistics, *weights, out), (*tokens.stride(), frames, channels, hidden, special_tokens, *grid),
            BLOCK_S=next_power_of_2(max(special_tokens, 1)), **_constants(tokens, hidden), **config,
        )  # fmt: skip

    _launch("fwd_kernel", tokens, hidden, run)
    return out


def backward(d_bias: Tensor, tokens: Tensor, parameters: list[Tensor], grid: tuple[int, int], special_tokens: int) -> list[Tensor]:
    batch, frames, _, channels = tokens.shape
    patches, hidden = grid[0] * grid[1], parameters[2].shape[0]
    statistics, weights = _statistics(tokens, patches, special_tokens), _weights(parameters)

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=tokens.device)

    d_a2 = fp32(batch * frames, patches, hidden)
    sizes = (*tokens.stride(), frames, channels, hidden, special_tokens, *grid)

    def run_hidden(config: autotune.Config) -> list[Tensor]:
        tiles = cdiv(patches, config["BLOCK_P"])
        programs = tiles * batch * frames
        parts = [fp32(programs, hidden), fp32(programs), fp32(programs, hidden)]
        launcher.launch(
            bwd.mask_head_bwd_kernel_hidden, (tiles, batch * frames),
            (d_bias, tokens, *statistics, *weights, d_a2, *parts), sizes, **_constants(tokens, hidden), **config
        )  # fmt: skip
        return parts

    def run_channels(config: autotune.Config) -> list[Tensor]:
        tiles = cdiv(patches, config["BLOCK_P"])
        shares = min(SHARES, tiles * batch * frames)
        parts = [fp32(shares, channels, hidden), fp32(shares, 9, channels), fp32(shares, channels)]
        launcher.launch(
            bwd.mask_head_bwd_kernel_channels, (cdiv(channels, config["BLOCK_C"]), shares),
            (tokens, *statistics, *weights[:3], d_a2, *parts), (*sizes, tiles, tiles * batch * frames),
            BLOCK_K=32, **_constants(tokens, hidden), **config,
        )  # fmt: skip
        return parts

    d_w4, d_b4, d_b2 = (part.sum(0) for part in _launch("bwd_kernel_hidden", tokens, hidden, run_hidden))
    d_w2, d_w0, d_b0 = (part.sum(0) for part in _launch("bwd_kernel_channels", tokens, hidden, run_channels))
    sums = (d_w0.t(), d_b0, d_w2.t(), d_b2, d_w4, d_b4)
    return [total.reshape(parameter.shape).to(parameter.dtype) for total, parameter in zip(sums, parameters, strict=True)]


def example(dtype: torch.dtype) -> None:
    """Forward and backward at the official size (10 frames of 24 x 37 patches, 1024 channels), for dry runs."""
    grid, special_tokens = (24, 37), 5
    parameters = [torch.empty(shape) for shape in [(1024, 1, 3, 3), (1024,), (256, 1024, 1, 1), (256,), (1, 256, 1, 1), (1,)]]
    tokens = torch.empty(1, 10, 893, 1024, dtype=dtype)
    bias = forward(tokens, parameters, grid, special_tokens)
    backward(bias, tokens, parameters, grid, special_tokens)


def examples() -> dict[str, Callable[[], None]]:
    return {"mask head, bf16": partial(example, torch.bfloat16), "mask head, fp32": partial(example, torch.float32)}
