"""torch's scaled_dot_product_attention with one of its kernels named, where `sdpa` leaves the choice to torch. The gated rows as in `sdpa`.

FlashAttention-3 and 4 are reached through torch's own switch, if their packages are installed. The switch holds for the whole process and
for every SDPA call on CUDA, backward included. So it is turned for one forward and back again, and never if the user has turned it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Backend
from . import gated_rows
from .problem import HALF, AttentionProblem, all_of, import_error, no_lse

PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute.interface"}
_turning = threading.Lock()
CAPABILITIES = {"FA3": (9,), "FA4": (9, 10)}  # the major number


def _cuda_only(problem: AttentionProblem) -> list[str]:
    return [] if problem.device == "cuda" else [f"it runs on cuda, the tensors are on {problem.device}"]


def _takes(dtypes: tuple[torch.dtype, ...], step: int, most: int) -> Callable[[AttentionProblem], list[str]]:
    def unsupported(problem: AttentionProblem) -> list[str]:
        reasons = []
        if problem.dtype not in dtypes:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            reasons.append(f"it takes {names}, not {str(problem.dtype).removeprefix('torch.')}")
        if problem.head_dim % step or problem.head_dim > most:
            reasons.append(f"its head dim must be a multiple of {step} up to {most}, not {problem.head_dim}")
        return reasons

    return unsupported


def _plain(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, kernel)):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _switch() -> Any:
    """The module with torch's switch between flash attention packages; None if this torch has none."""
    import torch.nn.attention as switch

    names = ("activate_flash_attention_impl", "current_flash_attention_impl", "list_flash_attention_impls", "restore_flash_attention_impl")
    return switch if all(hasattr(switch, name) for name in names) else None


def _switch_unavailable(name: str) -> list[str]:
    switch = _switch()
    if switch is None or name not in switch.list_flash_attention_impls():
        return [f"this torch ({torch.__version__}) has no switch for {name}"]
    error = import_error(PACKAGES[name])
    if error:
        return [f"{name} could not be imported ({error})"]
    if not torch.cuda.is_available():
        return ["there is no CUDA device"]
    major = torch.cuda.get_device_capability()[0]
    if major not in CAPABILITIES[name]:
        return [f"{name} is for compute capability {' and '.join(map(str, CAPABILITIES[name]))}, this GPU has {major}"]
    current = switch.current_flash_attention_impl()
    return [] if current in (None, name) else [f"torch's switch for flash attention has been turned to {current}"]


def _plain_switched(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    switch = _switch()
    with _turning:
        if switch.current_flash_attention_impl() == name:  # by the user
            return _plain("FLASH_ATTENTION", q, k, v, scale)
        switch.activate_flash_attention_impl(name)
        try:
            return _plain("FLASH_ATTENTION", q, k, v, scale)
        finally:
            switch.restore_flash_attention_impl()


def _forward_only(problem: AttentionProblem) -> list[str]:
    return ["torch's switch would have to stay turned for its backward"] if problem.needs_grad else []


def _backend(name: str, summary: str, plain: gated_rows.Attention, takes: Callable[[AttentionProblem], list[str]], **options) -> Backend:
    return Backend(name, summary, gated_rows.around(plain), unsupported=all_of(no_lse, _cuda_only, takes), **options)


BACKENDS = [
    _backend("sdpa_flash", "torch SDPA by its FlashAttention-2", functools.partial(_plain, "FLASH_ATTENTION"), _takes(HALF, 8, 256)),
    _backend("sdpa_cudnn", "torch SDPA by cuDNN", functools.partial(_plain, "CUDNN_ATTENTION"), _takes(HALF, 8, 256)),
    _backend(
        "sdpa_efficient",
        "torch SDPA by its memory-efficient kernel",
        functools.partial(_plain, "EFFICIENT_ATTENTION"),
        _takes((torch.float32, *HALF), 8, 512),
    ),
    *(
        _backend(
            f"sdpa_{name.lower()}",
            f"torch SDPA by FlashAttention-{name[-1]}",
            functools.partial(_plain_switched, name),
            all_of(_takes(HALF, 8, 256), _forward_only),
            unavailable=functools.partial(_switch_unavailable, name),
        )
        for name in PACKAGES
    ),
]
