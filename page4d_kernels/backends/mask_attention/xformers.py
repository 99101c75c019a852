"""xformers' memory_efficient_attention on all rows, the gated rows again with the bias."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from ..registry import Backend
from . import gated_rows
from .problem import all_of, no_lse, only_cuda_half


@functools.cache
def _load() -> tuple[Any, str]:
    """The module, or None and why."""
    try:
        return importlib.import_module("xformers.ops"), ""
    except (ImportError, OSError) as error:  # an extension built for another torch fails with either
        return None, str(error)


def _missing() -> list[str]:
    module, error = _load()
    return [] if module else [f"xformers could not be imported ({error}); pip install 'page4d[xformers]'"]


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _load()[0].memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def _forward(q, k, v, query_gate, key_bias, layout, scale):
    return gated_rows.attend(_plain, q, k, v, query_gate, key_bias, layout, scale)


BACKEND = Backend(
    "xformers",
    "xformers, then the gated rows again with the bias in fp32",
    _forward,
    why_not=all_of(no_lse, only_cuda_half),
    missing=_missing,
)
