"""Description of a `mask_attention` call, from which a backend decides whether it can serve it, and the call's arguments."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import TokenLayout


@dataclass(frozen=True)
class AttentionProblem:
    device: str  # "cpu", "cuda", "mps" ...
    dtype: torch.dtype
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    biased: bool = False  # query_gate and key_bias are given
    layout: TokenLayout | None = None
    needs_grad: frozenset[str] = frozenset()  # of "q", "k", "v", "query_gate", "key_bias"
    need_lse: bool = False
    aligned: bool = True  # the strides of q, k and v are multiples of 16 bytes

    @property
    def length(self) -> int:
        """Tokens, by which `qualify` sorts problems into classes."""
        return self.keys

    @property
    def variant(self) -> str:
        """What it judges apart."""
        return f"head dim {self.head_dim}"

    @property
    def kind(self) -> str:
        """How the rows see the mask, which it times apart."""
        mask = "no mask" if not self.biased else "mask with layout" if self.layout is not None else "mask without layout"
        rows = ", few rows" if 4 * self.queries <= self.keys else ""
        return f"{mask}{rows}"

    @classmethod
    def typical(cls, device: str) -> AttentionProblem:
        """Inference at the official size: 2 frames of 336 x 518 pixels, 24 x 37 patches and 5 special tokens each."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return cls(device, dtype, 1, 16, 2 * 893, 2 * 893, 64, biased=True, layout=TokenLayout(2, 893, 5))


class AttentionArgs(NamedTuple):
    """The arguments of one call, as the op hands them to a backend. See `mask_attention` for shapes and dtypes."""

    q: Tensor
    k: Tensor
    v: Tensor
    query_gate: Tensor | None
    key_bias: Tensor | None
    layout: TokenLayout | None
    scale: float


HALF = (torch.float16, torch.bfloat16)


def all_of(*checks: Callable[[AttentionProblem], list[str]]) -> Callable[[AttentionProblem], list[str]]:
    """Combine several `unsupported` functions into one."""
    return lambda problem: [reason for check in checks for reason in check(problem)]


def no_lse(problem: AttentionProblem) -> list[str]:
    return ["it does not return the log-sum-exp"] if problem.need_lse else []


def only_cuda_half(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.device != "cuda":
        reasons.append(f"it runs on cuda, the tensors are on {problem.device}")
    if problem.dtype not in HALF:
        reasons.append(f"it takes float16 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    return reasons


@functools.cache
def _import_error(module: str) -> str:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # an extension built for another torch raises either one, with an explanation
        return f"{module}: {error}"
    return ""


def import_error(module: str) -> str:
    """Why a module cannot be imported; empty if it can."""
    return _import_error(module)


# What torch.compiler.assume_constant_result sets, without importing the compiler. It keeps the import from being traced.
import_error._dynamo_marked_constant = True  # type: ignore[attr-defined]
