"""The official release's arithmetic, kept as a baseline: the bias folded into extra head dimensions of one SDPA call.

D' = 8 floor((D + 8) / 8), q' = [q sqrt(D'/D), r sqrt(D'), 0 ...], k' = [k, c, 0 ...], v' = [v, 0 ...] with SDPA's default 1/sqrt(D').
It copies q, k and v, does D'/D times the matmul work for every row, and rounds r sqrt(D') and c to the input dtype. With a given
`scale`, q is multiplied by scale * sqrt(D') instead.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import Backend
from .problem import AttentionArgs, AttentionProblem, all_of, no_lse


def _head_dim(problem: AttentionProblem) -> list[str]:
    return [f"its head dim must be a multiple of 8, not {problem.head_dim}"] if problem.head_dim % 8 else []


def _forward(args: AttentionArgs) -> Tensor:
    q, k, v, query_gate, key_bias, _, scale = args
    if query_gate is None or key_bias is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    head_dim = q.shape[-1]
    extended = 8 * ((head_dim + 8) // 8)

    def column(x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype)[:, None, :, None].expand(*like.shape[:3], 1)

    zeros = extended - head_dim - 1
    q_ = F.pad(torch.cat([q * (scale * math.sqrt(extended)), column(query_gate * math.sqrt(extended), q)], -1), (0, zeros))
    k_ = F.pad(torch.cat([k, column(key_bias, k)], -1), (0, zeros))
    v_ = F.pad(v, (0, extended - head_dim))
    return F.scaled_dot_product_attention(q_, k_, v_)[..., :head_dim]


BACKEND = Backend(
    "sdpa_augmented",
    "the official head-dim trick: bias rounded to the input dtype; a baseline",
    _forward,
    unsupported=all_of(no_lse, _head_dim),
    automatic=False,
)
