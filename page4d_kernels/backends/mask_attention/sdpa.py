"""torch's scaled_dot_product_attention on all rows, then the gated rows again with the bias. The default where no kernel of ours serves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Backend
from . import gated_rows
from .problem import AttentionProblem, all_of, no_lse


def _stays_linear(problem: AttentionProblem) -> list[str]:
    """Accept only cases in which torch has a kernel that never stores the N x N logits."""
    if problem.device == "cuda" and problem.dtype == torch.float64:
        return ["torch has only its N x N kernel for float64 on cuda"]
    if problem.device == "cuda" and problem.head_dim % 8:
        return [f"torch's fused kernels need a head dim that is a multiple of 8, not {problem.head_dim}"]
    return []


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


BACKEND = Backend(
    "sdpa",
    "torch SDPA, then the gated rows again with the bias",
    gated_rows.around(_plain),
    unsupported=all_of(no_lse, _stays_linear),
)
