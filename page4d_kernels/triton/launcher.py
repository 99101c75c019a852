"""Launch kernels: a launch like an earlier one goes straight to its compiled kernel.

`kernel[grid](...)` classifies every argument and prints the classes to find the compiled kernel. That takes most of the time of a launch
on the host, and at a few frames the host is the limit. What Triton compiles depends on the dtypes of tensors and whether their addresses
are multiples of 16, and on integers: their size, and whether they are 1 or a multiple of 16. So a launch with the same integers, and
tensors of the same dtypes and alignments, is served by the same compiled kernel, which can be called with its arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

LIMIT = 4096  # remembered launches. Each new length adds some; when there are too many, all are forgotten
_launches: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...]]] = {}  # the compiled kernel with its grid, and its constants

next_power_of_2 = cache(triton.next_power_of_2)  # called on the host, Triton's takes 5 us


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # called on the host, triton.cdiv takes 5 us


def launch(kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], numbers: tuple[int | float, ...], **constants: Any) -> None:
    """`kernel[grid](*tensors, *numbers, **constants)`. The constants are the constexpr parameters, which come last, num_warps and so on."""
    if not isinstance(kernel, triton.JITFunction):  # in the interpreter
        kernel[grid](*tensors, *numbers, **constants)
        return
    mode = knobs.compilation.instrumentation_mode  # Proton, the profiler, sets it while a process runs
    device = driver.active.get_current_device()
    types = tuple(map(type, numbers))  # 1 == 1.0
    key = (kernel.fn, mode, device, grid, numbers, types, tuple(constants.items()), *[_trait(x) for x in tensors])
    known = _launches.get(key)
    if known is None:
        compiled = kernel[grid](*tensors, *numbers, **constants)
        if _may_be_called(compiled):
            if len(_launches) >= LIMIT:
                _launches.clear()
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            _launches[key] = compiled[grid + (1,) * (3 - len(grid))], tuple(constants[name] for name in names)
    else:
        call, values = known
        call(*tensors, *numbers, *values)


def _trait(x: Any) -> Any:
    """What Triton sees of a tensor or descriptor."""
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    return x.dtype if x.data_ptr() % 16 == 0 else (x.dtype, "not aligned")


def _may_be_called(compiled: Any) -> bool:
    """Not on AMD GPUs, where the size of a tensor's storage is another trait, and not what is compiled in the background."""
    return isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda"


def forget() -> None:
    """Let Triton find every compiled kernel anew."""
    _launches.clear()
