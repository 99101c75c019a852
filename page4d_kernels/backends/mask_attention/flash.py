"""The flash-attn packages (FlashAttention-3 if it is there, else 2) on all rows, the gated rows again with the bias."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from torch import Tensor

from ..registry import Backend
from . import gated_rows
from .problem import AttentionProblem, all_of, no_lse, only_cuda_half

PACKAGES = ("flash_attn_interface", "flash_attn")  # FlashAttention-3, FlashAttention-2


@functools.cache
def _load() -> tuple[Callable[..., Tensor] | None, str]:
    """The function, or None and why."""
    errors = []
    for package in PACKAGES:
        try:
            return importlib.import_module(package).flash_attn_func, ""
        except (ImportError, AttributeError) as error:  # an ABI failure says so here too
            errors.append(f"{package}: {error}")
    return None, "; ".join(errors)


def _missing() -> list[str]:
    function, error = _load()
    return [] if function else [f"no flash-attn package could be imported ({error}); pip install 'page4d[flash]'"]


def _limits(problem: AttentionProblem) -> list[str]:
    if problem.head_dim % 8 or problem.head_dim > 256:
        return [f"its head dim has to be a multiple of 8 up to 256, not {problem.head_dim}"]
    return []


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    function, _ = _load()
    assert function is not None  # `missing` has said so
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # early releases of version 3 return the log-sum-exp too


def _forward(q, k, v, query_gate, key_bias, layout, scale):
    return gated_rows.attend(_plain, q, k, v, query_gate, key_bias, layout, scale)


BACKEND = Backend(
    "flash",
    "flash-attn packages, then the gated rows again with the bias in fp32",
    _forward,
    why_not=all_of(no_lse, only_cuda_half, _limits),
    missing=_missing,
)
