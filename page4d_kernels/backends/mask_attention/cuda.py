"""Our CUDA kernel for Hopper (csrc/cuda/mask_attention_sm90.cuh). Not yet run on a GPU. Backward: Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .. import native_common, triton_common
from ..registry import Backend
from . import compiled
from .problem import AttentionArgs, AttentionProblem, all_of, only_cuda_half

HEAD_DIMS = (64, 128)
VARIANT = 0  # of the kernel, an index of native.library().mask_attention_cuda_variants; docs/cuda.md says what they are
MAX_SPECIAL_TOKENS = 128  # per frame, so that a tile of rows holds the special tokens of whole frames


def unexpanded(x: Tensor) -> Tensor:
    """`x`, or a copy if it is expanded (stride 0 over several entries): what a tensor map does with stride 0 is not documented."""
    return x.contiguous() if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)) else x


def _forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    args = args._replace(q=unexpanded(args.q), k=unexpanded(args.k), v=unexpanded(args.v))
    args = args._replace(query_gate=compiled.unit_stride(args.query_gate), key_bias=compiled.unit_stride(args.key_bias))
    q, layout = args.q, args.layout
    out, lse = compiled.outputs(q)
    call = compiled.arguments(args, out, lse)
    frames = (0, 0, 0) if layout is None else (layout.frames, layout.tokens_per_frame, layout.special_tokens)
    dtype, device, stream = native.cuda_launch_args(q)
    with torch.cuda.device_of(q):  # restores the caller's current device afterwards
        splits = native.library().mask_attention_cuda_splits(*call, frames, dtype, device)
        parts = [torch.empty(splits, *x.shape, dtype=torch.float32, device=q.device) for x in (q, lse)] if splits > 1 else []
        addresses = [x.data_ptr() for x in parts] or [0, 0]
        native.library().mask_attention_cuda(*call, frames, VARIANT, splits, addresses, dtype, device, stream)
    return out, lse


def _unsupported(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        major, minor = torch.cuda.get_device_capability()
        reasons.append(f"it is for Hopper (sm_90), this GPU is sm_{major}{minor}: triton serves the rest")
    if problem.head_dim not in HEAD_DIMS:
        reasons.append(f"it takes head dims {' and '.join(map(str, HEAD_DIMS))}, not {problem.head_dim}")
    if not problem.aligned:
        reasons.append("q, k and v must step by multiples of 16 bytes")
    if problem.layout is not None and problem.layout.special_tokens > MAX_SPECIAL_TOKENS:
        reasons.append(f"it takes at most {MAX_SPECIAL_TOKENS} special tokens in a frame, not {problem.layout.special_tokens}")
    if problem.needs_grad:
        reasons += [f"its backward is Triton's: {reason}" for reason in triton_common.unavailable()]
    return reasons


BACKEND = Backend(
    "cuda",
    "our CUDA kernel for Hopper; not yet run on a GPU; backward by triton",
    _forward,
    triton_common.launch("mask_attention", "backward"),
    unsupported=all_of(only_cuda_half, _unsupported),
    unavailable=lambda: native_common.cuda_unavailable("mask_attention_cuda"),
)
