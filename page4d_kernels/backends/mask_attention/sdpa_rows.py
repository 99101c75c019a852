"""Rows that all see the bias, by torch's own fused kernel, with the bias in more channels (`bias_channels.py`).

The keys are split, so that few rows fill a GPU, and the partial results are merged by their log-sum-exp. Only k is copied, v is not. Made
for the gated rows of a sequence (`gated_rows.py`): the extra channels are spent on every row it is given. Backward: chunked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout import empty_token_major
from ..registry import Backend
from . import bias_channels, chunked
from .problem import AttentionArgs, AttentionProblem

MIN_SPLIT_KEYS = 512
ROWS_PER_PROGRAM = 64  # of torch's kernel


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain attention (B, H, N, D) and its log-sum-exp, by torch's kernel that returns both. v may have fewer channels than q and k."""
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)
        return out, lse[..., : q.shape[2]]  # it pads the rows
    channels = v.shape[-1]
    padded = F.pad(v, (0, q.shape[-1] - channels))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, padded, 0.0, False, scale=scale)
    return out[..., :channels], lse


def _splits(q: Tensor, keys: int) -> int:
    """Enough for two programs per multiprocessor, with at least `MIN_SPLIT_KEYS` keys each. 1 on a CPU."""
    if not q.is_cuda:
        return 1
    heads, rows = q.shape[1:3]
    programs = heads * -(-rows // ROWS_PER_PROGRAM)
    wanted = -(-2 * torch.cuda.get_device_properties(q.device).multi_processor_count // programs)
    return max(1, min(wanted, keys // MIN_SPLIT_KEYS))


def _merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Partial results along dim 0 (parts, H, N, D) and (parts, H, N), merged in fp32."""
    highest = lses.amax(0)
    weights = torch.exp(lses - highest.masked_fill(highest == -torch.inf, 0))
    total = weights.sum(0)
    out = (outs.float() * weights.unsqueeze(-1)).sum(0) / total.masked_fill(total == 0, 1).unsqueeze(-1)
    return out, highest + total.log()


def _forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    q, k, v, query_gate, key_bias, _, scale = args
    q_, k_ = q, k
    if query_gate is not None and key_bias is not None:
        q_, k_ = bias_channels.fold(q, k, query_gate, key_bias, scale)
    splits = _splits(q, k.shape[2])
    each = k.shape[2] // splits
    out, lse = empty_token_major(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for b in range(q.shape[0]):
        whole = [x[:, : splits * each].unflatten(1, (splits, each)).transpose(0, 1) for x in (k_[b], v[b])]  # (splits, H, each, D)
        left = [x[None, :, splits * each :] for x in (k_[b], v[b])]
        parts = [_attend(q_[b].expand(splits, -1, -1, -1), whole[0], whole[1], scale)]
        if left[0].shape[2]:
            parts.append(_attend(q_[b : b + 1], left[0], left[1], scale))
        outs, lses = (torch.cat(some) for some in zip(*parts, strict=True))
        out[b], lse[b] = _merge(outs, lses)
    return out, lse


def _unsupported(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.device not in ("cpu", "cuda"):
        reasons.append(f"it runs on cpu and cuda, not on {problem.device}")
    if problem.dtype not in bias_channels.DTYPES:
        reasons.append(f"it takes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    if problem.head_dim % 8:
        reasons.append(f"its head dim must be a multiple of 8, not {problem.head_dim}")
    return reasons


BACKEND = Backend(
    "sdpa_rows",
    "rows with a bias by torch SDPA, the bias in more channels; not yet run on a GPU; backward by chunked",
    _forward,
    chunked.BACKEND.backward,
    unsupported=_unsupported,
)
