"""The flash-attn packages (FlashAttention-3 if installed, else 2) on all rows, then the gated rows again with the bias."""

from __future__ import annotations

from torch import Tensor

from ..registry import Backend
from . import gated_rows
from .problem import AttentionProblem, all_of, import_error, no_lse, only_cuda_half

PACKAGES = ("flash_attn_interface", "flash_attn")  # FlashAttention-3, FlashAttention-2


def _unavailable() -> list[str]:
    errors = [import_error(package) for package in PACKAGES]
    if "" in errors:
        return []
    return [f"no flash-attn package could be imported ({'; '.join(errors)}); pip install 'page4d[flash]'"]


def _unsupported(problem: AttentionProblem) -> list[str]:
    if problem.head_dim % 8 or problem.head_dim > 256:
        return [f"its head dim must be a multiple of 8 up to 256, not {problem.head_dim}"]
    return []


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if import_error("flash_attn_interface") == "":
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, deterministic=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # early releases of version 3 also return the log-sum-exp


BACKEND = Backend(
    "flash",
    "flash-attn packages, then the gated rows again with the bias",
    gated_rows.around(_plain),
    unsupported=all_of(no_lse, only_cuda_half, _unsupported),
    unavailable=_unavailable,
)
