"""Our compiled CPU kernels (csrc/cpu/attention.h): the best of AVX2, AVX-512, AVX-512 BF16 and AMX. Backward: chunked."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .. import native_common
from ..registry import Backend
from . import chunked, compiled
from .problem import AttentionArgs, AttentionProblem


def _forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    q = args.q
    out, lse = compiled.outputs(q)
    gate, bias = compiled.unit_stride(args.query_gate), compiled.unit_stride(args.key_bias)
    native.library().mask_attention(
        *compiled.arguments(args._replace(query_gate=gate, key_bias=bias), out, lse), *native.cpu_launch_args(q)
    )
    return out, lse


def _auto_skips(problem: AttentionProblem) -> list[str]:
    """Where `sdpa` is as fast or faster. docs/cpu.md says which cases were measured and which were only tried."""
    reasons = []
    if problem.needs_grad:
        reasons.append("the backward of sdpa is faster")
    if native.level() < native.LEVELS.index("avx512"):
        reasons.append("it is faster from AVX-512 on")
    if problem.dtype == torch.float32 and problem.keys < 512:
        reasons.append("in float32 it is faster from 512 keys on")
    return reasons


BACKEND = Backend(
    "cpu",
    "our compiled kernels, fp32 softmax; backward by chunked",
    _forward,
    chunked.BACKEND.backward,
    unsupported=native_common.unsupported,
    unavailable=native_common.unavailable,
    auto_skips=_auto_skips,
)
