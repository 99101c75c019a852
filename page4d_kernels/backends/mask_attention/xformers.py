"""xformers' memory_efficient_attention on all rows, then the gated rows again with the bias."""

from __future__ import annotations

from torch import Tensor

from ..registry import Backend
from . import gated_rows
from .problem import all_of, import_error, no_lse, only_cuda_half


def _unavailable() -> list[str]:
    error = import_error("xformers.ops")
    return [f"xformers could not be imported ({error}); pip install 'page4d[xformers]'"] if error else []


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


BACKEND = Backend(
    "xformers",
    "xformers, then the gated rows again with the bias",
    gated_rows.around(_plain),
    unsupported=all_of(no_lse, only_cuda_half),
    unavailable=_unavailable,
)
