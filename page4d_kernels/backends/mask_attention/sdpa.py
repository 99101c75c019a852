"""torch's scaled_dot_product_attention on all rows, then the gated rows again with the bias. The default where no kernel of ours serves.

Without a layout every row has the bias. It is then folded into more channels (`bias_channels.py`), unless a gradient of r or c is wanted:
that would be rounded to q's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout import empty_token_major
from ..registry import Backend
from . import bias_channels, gated_rows
from .problem import AttentionArgs, AttentionProblem, all_of, no_lse

ROWS_AT_ONCE = 1 << 17  # of all heads: enough to fill a GPU


def _stays_linear(problem: AttentionProblem) -> list[str]:
    """Accept only cases in which torch has a kernel that never stores the N x N logits."""
    if problem.device == "cuda" and problem.dtype == torch.float64:
        return ["torch has only its N x N kernel for float64 on cuda"]
    if problem.device == "cuda" and problem.head_dim % 8:
        return [f"torch's fused kernels need a head dim that is a multiple of 8, not {problem.head_dim}"]
    return []


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _forward(args: AttentionArgs) -> Tensor:
    q, k, v, query_gate, key_bias, layout, scale = args
    if query_gate is None or key_bias is None or layout is not None or not _folds(q, query_gate, key_bias):
        return _composed(args)

    def attend(heads: slice) -> Tensor:
        wide = bias_channels.fold(q[:, heads], k[:, heads], query_gate, key_bias, scale)
        padded = F.pad(v[:, heads], (0, bias_channels.EXTRA))  # torch's flash kernels want one head dim
        return _plain(*wide, padded, scale)[..., : v.shape[-1]]

    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return attend(slice(None))
    out, some = empty_token_major(q), max(1, ROWS_AT_ONCE // q.shape[2])
    for first in range(0, q.shape[1], some):  # the copies of a few heads at a time need little memory
        out[:, first : first + some] = attend(slice(first, first + some))
    return out


def _folds(q: Tensor, query_gate: Tensor, key_bias: Tensor) -> bool:
    return q.dtype in bias_channels.DTYPES and not (query_gate.requires_grad or key_bias.requires_grad)


_composed = gated_rows.around(_plain)

BACKEND = Backend(
    "sdpa",
    "torch SDPA, then the gated rows again with the bias",
    _forward,
    unsupported=all_of(no_lse, _stays_linear),
)
