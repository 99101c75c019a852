"""Launch of the QK-norm + RoPE kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from . import autotune, launcher
from . import qk_norm_rope as kernels
from .launcher import cdiv, next_power_of_2
from .target import per_target

T = TypeVar("T")
# Tokens and warps. The first is the built-in choice. Not yet measured on a GPU.
TILES = [(32, 4), (64, 4), (16, 2), (64, 8), (128, 8)]
WIDE = (32, 8)  # for head dims above 64; at 64 its backward spills on sm_90


def _blocks(head_dim: int) -> dict[str, int]:
    return {"D": head_dim, "BLOCK_D": next_power_of_2(head_dim)}


def resources(head_dim: int, config: autotune.Config) -> autotune.ResourceEstimate:
    """Shared memory: sums over tokens pass between warps. Registers: about eight blocks of values (q or k, partner, angles, results)."""
    block_d = next_power_of_2(head_dim)
    return autotune.ResourceEstimate(4 * block_d * config["num_warps"] + 1024, 8 * config["BLOCK_N"] * block_d)


def candidates(head_dim: int) -> list[autotune.Config]:
    tiles = TILES if head_dim <= 64 else [*TILES, WIDE]
    configs = [{"BLOCK_N": tokens, "num_warps": warps} for tokens, warps in tiles]
    return autotune.prune(configs, lambda config: resources(head_dim, config))


@per_target
def _tuning(kernel: str, head_dim: int, dtype: torch.dtype) -> tuple[str, list[autotune.Config]]:
    return autotune.key(f"qk_norm_rope_{kernel}", f"D{next_power_of_2(head_dim)}", dtype), candidates(head_dim)


def _launch(kernel: str, x: Tensor, run: Callable[[autotune.Config], T]) -> T:
    key, configs = _tuning(kernel, x.shape[-1], x.dtype)
    return run(autotune.choose(key, configs, run))


def _fp32(table: Tensor) -> Tensor:
    return table.to(torch.float32).contiguous()


def forward(
    qkv: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: tuple[int, int],
    special_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    q, k = (torch.empty(batch, heads, tokens, head_dim, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    vectors = [x.contiguous() for x in (q_weight, q_bias, k_weight, k_bias)]
    tables = _fp32(cos), _fp32(sin)

    def run(config: autotune.Config) -> None:
        launcher.launch(
            kernels.qk_norm_rope_fwd_kernel, (cdiv(tokens, config["BLOCK_N"]) * batch * heads,),
            (qkv, *vectors, *tables, q, k),
            (*qkv.stride()[:4], heads, tokens, special_tokens + grid[0] * grid[1], special_tokens, grid[1], eps),
            **_blocks(head_dim), **config,
        )  # fmt: skip

    _launch("fwd_kernel", qkv, run)
    return q, k


def backward(
    d_q: Tensor,
    d_k: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    grid: tuple[int, int],
    special_tokens: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, _, heads, head_dim = qkv.shape
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    d_qkv[:, :, 2].zero_()
    weights, tables = (q_weight.contiguous(), k_weight.contiguous()), (_fp32(cos), _fp32(sin))

    def run(config: autotune.Config) -> Tensor:
        programs = cdiv(tokens, config["BLOCK_N"]) * batch * heads
        sums = torch.empty(4, programs, head_dim, dtype=torch.float32, device=qkv.device)
        launcher.launch(
            kernels.qk_norm_rope_bwd_kernel, (programs,),
            (d_q, d_k, qkv, *weights, *tables, d_qkv, sums),
            (*d_q.stride(), *d_k.stride(), *qkv.stride()[:4], sums.stride(0),
             heads, tokens, special_tokens + grid[0] * grid[1], special_tokens, grid[1], eps), **_blocks(head_dim), **config,
        )  # fmt: skip
        return sums

    sums = _launch("bwd_kernel", qkv, run)
    d_qw, d_qb, d_kw, d_kb = (part.sum(0).to(q_weight.dtype) for part in sums)  # copies: an operator must not return views
    return d_qkv, d_qw, d_qb, d_kw, d_kb


def example(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> None:
    """Forward and backward at the official size (10 frames of 893 tokens, 16 heads of 64), for dry runs."""
    from ..reference.qk_norm_rope import rope_tables

    grid, special_tokens = (24, 37), 5
    qkv = torch.empty(1, 10 * 893, 3, 16, head_dim, dtype=dtype)
    weight, bias, (cos, sin) = torch.empty(head_dim), torch.empty(head_dim), rope_tables(grid, head_dim)
    q, k = forward(qkv, weight, bias, weight, bias, cos, sin, grid, special_tokens, 1e-5)
    backward(q, k, qkv, weight, weight, cos, sin, grid, special_tokens, 1e-5)


def examples() -> dict[str, Callable[[], None]]:
    return {"QK-norm + RoPE": example}
