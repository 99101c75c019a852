"""Argument checks shared by the ops. Each error is one line that says what is wrong and what was expected.

A check runs before every launch, so a message that is put together from its parts is made only when it is needed.
"""

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
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {shape}, not shape {tuple(x.shape)}")


def expect_floats(op: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{op} takes {', '.join(map(dtype_name, FLOATS))}, not {dtype_name(x.dtype)}")


def expect_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Same device and dtype."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} is {dtype_name(x.dtype)} but {other_name} is {dtype_name(other.dtype)}: convert one of them")
    expect_device(name, x, other_name, other)


def expect_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        verb = "are" if other_name.endswith("tokens") else "is"
        raise ValueError(f"{name} is on {x.device} but {other_name} {verb} on {other.device}: move one of them")


def expect_frames(grid: tuple[int, int], special_tokens: int) -> None:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (h, w), both at least 1, not {tuple(grid)}")
    if special_tokens < 0:
        raise ValueError(f"special_tokens must be at least 0, not {special_tokens}")


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Disable autocast inside an op, which chooses its dtypes itself. Autocast would round the fp32 logits and bias."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def values_can_be_read(x: Tensor) -> bool:
    """Whether checks may read values: always on the CPU, elsewhere only with PAGE4D_DEBUG=1, as reading synchronises the device."""
    if torch.compiler.is_compiling() or x.device.type == "meta" or is_fake(x):
        return False
    return x.device.type == "cpu" or env.flag("PAGE4D_DEBUG")


def expect_finite(name: str, x: Tensor) -> None:
    """Reads the values: see `values_can_be_read`."""
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} has {int((~x.isfinite()).sum())} values that are not finite")
