"""Argument checks shared by the ops. Each error is one line that says what is wrong and what was expected."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .. import env

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def expect_tensor(name: str, x: Tensor, rank: int, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, not {type(x).__name__}")
    expect(x.dim() == rank, f"{name} must have {rank} dimensions {shape}, not shape {tuple(x.shape)}")


def expect_floats(op: str, x: Tensor) -> None:
    names = ", ".join(map(dtype_name, FLOATS))
    if x.dtype not in FLOATS:
        raise TypeError(f"{op} takes {names}, not {dtype_name(x.dtype)}")


def expect_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and dtype."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} is {dtype_name(x.dtype)} but {other_name} is {dtype_name(other.dtype)}: convert one of them")
    expect(x.device == other.device, f"{name} is on {x.device} but {other_name} is on {other.device}: move one of them")


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Disable autocast inside an op, which chooses its dtypes itself. Autocast would round the fp32 logits and bias."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()


def values_can_be_read(x: Tensor) -> bool:
    """Whether checks may read values: always on the CPU, elsewhere only with PAGE4D_DEBUG=1, as reading synchronises the device."""
    if torch.compiler.is_compiling() or x.device.type == "meta" or is_fake(x):
        return False
    return x.device.type == "cpu" or env.flag("PAGE4D_DEBUG")


def expect_finite(name: str, x: Tensor) -> None:
    if values_can_be_read(x):
        expect(bool(x.isfinite().all()), f"{name} has {int((~x.isfinite()).sum())} values that are not finite")
