"""The ops whose time is bound by memory traffic. To add one, add its entry to `BANDWIDTH_OPS`: no other place in benchmarks/ names them.

`bytes` counts the fewest bytes that one call can move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from page4d_kernels import mask_head, qk_norm_rope, residual_norm, rope_tables
from page4d_kernels.backends.mask_head import BACKENDS as MASK_HEAD
from page4d_kernels.backends.qk_norm_rope import BACKENDS as QK_NORM_ROPE
from page4d_kernels.backends.registry import Registry
from page4d_kernels.backends.residual_norm import BACKENDS as RESIDUAL_NORM

from .sizes import GRID, HIDDEN, PATCHES, PER_FRAME, SPECIAL

if TYPE_CHECKING:
    from .cases import Case


@dataclass(frozen=True)
class BandwidthOp:
    """One op: `inputs(case, device, frames)` makes a list of tensors, `call(tensors, backend)` computes, `leaves` get gradients.

    With gradients enabled, `call` returns one tensor that the backward starts from. `reference` is the backend that the gate compares with.
    """

    registry: Registry
    inputs: Callable[[Case, str, int], list[Tensor]]
    call: Callable[..., Any]
    leaves: slice
    bytes: Callable[[Case], float]
    flops: Callable[[Case], float] | None = None  # only where the matrix unit can be the bottleneck
    reference: str = "reference"

    def work(self, case: Case) -> dict[str, float]:
        """The bytes and, where they matter, the flops of one call."""
        return {"bytes": self.bytes(case)} | ({"flops": self.flops(case)} if self.flops is not None else {})


# --- mask_head ---------------------------------------------------------------------------------------------------------------


def _mask_head_inputs(case: Case, device: str, frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = case.channels
    tokens = torch.randn(1, frames, PER_FRAME, channels, generator=generator) * 3 + 1
    shapes = [(channels, 1, 3, 3), (channels,), (HIDDEN, channels, 1, 1), (HIDDEN,), (1, HIDDEN, 1, 1), (1,)]
    parameters = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    return [tokens.to(device, case.dtype), *(p.to(device) for p in parameters)]


def _mask_head(tensors: list[Tensor], backend: str) -> Tensor:
    return mask_head(*tensors, grid=GRID, special_tokens=SPECIAL, backend=backend)


def _mask_head_bytes(case: Case) -> float:
    """The patch tokens are read twice: for the statistics, then for the head. The key bias is 1/channels of that and is not counted."""
    return 2.0 * case.frames * PATCHES * case.channels * case.dtype.itemsize


def _mask_head_flops(case: Case) -> float:
    """The matmul with W2, the nine taps and the last layer. The backward recomputes them and has two more of each."""
    passes = {"forward": 1, "backward": 3}[case.direction]
    return passes * 2.0 * case.frames * PATCHES * (case.channels * HIDDEN + 9 * case.channels + HIDDEN)


# --- qk_norm_rope ------------------------------------------------------------------------------------------------------------


def _qk_norm_rope_inputs(case: Case, device: str, frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, frames * PER_FRAME, 3, case.heads, case.head_dim, generator=generator)
    vectors = [torch.randn(case.head_dim, generator=generator) for _ in range(4)]
    return [*(x.to(device, case.dtype) for x in (qkv, *vectors)), *rope_tables(GRID, case.head_dim, device=device)]


def _qk_norm_rope(tensors: list[Tensor], backend: str) -> Any:
    q, k, _ = qk_norm_rope(*tensors, grid=GRID, special_tokens=SPECIAL, backend=backend)
    return torch.stack([q, k]) if torch.is_grad_enabled() else (q, k)


def _qk_norm_rope_bytes(case: Case) -> float:
    """q and k are read once and written once; v is not touched. The backward reads both and their gradients, and writes qkv's gradient."""
    return {"forward": 4.0, "backward": 7.0}[case.direction] * case.tokens * case.channels * case.dtype.itemsize


# --- residual_norm -----------------------------------------------------------------------------------------------------------


def _residual_norm_inputs(case: Case, device: str, frames: int) -> list[Tensor]:
    """As in the trunk: the residual stream and the parameters in fp32, the branch in the case's dtype."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(1, frames * PER_FRAME, case.channels, generator=generator) for _ in range(2))
    vectors = [torch.randn(case.channels, generator=generator) for _ in range(3)]
    return [x.to(device), branch.to(device, case.dtype), *(vector.to(device) for vector in vectors)]


def _residual_norm(tensors: list[Tensor], backend: str) -> Any:
    total, normal = residual_norm(*tensors, dtype=tensors[1].dtype, backend=backend)
    return normal if torch.is_grad_enabled() else (total, normal)


def _residual_norm_bytes(case: Case) -> float:
    """The forward reads the fp32 stream and the branch, and writes the sum and the norm. The backward reads four and writes two."""
    fp32_tensors, other_tensors = {"forward": (2, 2), "backward": (3, 3)}[case.direction]
    return float(case.tokens * case.channels * (4 * fp32_tensors + case.dtype.itemsize * other_tensors))


BANDWIDTH_OPS = {
    "mask_head": BandwidthOp(
        registry=MASK_HEAD,
        inputs=_mask_head_inputs,
        call=_mask_head,
        leaves=slice(1, None),  # the parameters
        bytes=_mask_head_bytes,
        flops=_mask_head_flops,
    ),
    "qk_norm_rope": BandwidthOp(
        registry=QK_NORM_ROPE,
        inputs=_qk_norm_rope_inputs,
        call=_qk_norm_rope,
        leaves=slice(5),  # qkv and the norms' parameters, not the rotation tables
        bytes=_qk_norm_rope_bytes,
    ),
    "residual_norm": BandwidthOp(
        registry=RESIDUAL_NORM,
        inputs=_residual_norm_inputs,
        call=_residual_norm,
        leaves=slice(None),
        bytes=_residual_norm_bytes,
    ),
}
