"""Constant tables, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode

P = ParamSpec("P")
T = TypeVar("T")


def cache_tensors(function: Callable[P, T]) -> Callable[P, T]:
    """Remember what `function` of hashable arguments, the device among them, returns.

    The tensors are made outside inference mode, so that training can use what inference made first. Nothing is remembered while a
    compiler or a fake-tensor mode is at work: its tensors are not real.
    """
    remembered = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or detect_fake_mode() is not None:
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return remembered(*args, **kwargs)  # type: ignore[arg-type]  # the arguments are hashable by contract

    return wrapper
