"""A cache of constant tables."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode

P = ParamSpec("P")
T = TypeVar("T")


def cache_tensors(function: Callable[P, T]) -> Callable[P, T]:
    """Cache the tensors that `function` returns. Its arguments must be hashable and include the device.

    The tensors are made outside inference mode, so that training can use a table that inference made first. Under a compiler or a
    fake-tensor mode nothing is cached, as those tensors are not real.
    """
    remembered = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or detect_fake_mode() is not None:
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return remembered(*args, **kwargs)  # type: ignore[arg-type]  # the contract says that the arguments are hashable

    return wrapper
