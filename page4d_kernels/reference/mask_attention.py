"""softmax(q k^T * scale + r c^T) v, with all N x N logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import accumulation_dtype


def _logits(q: Tensor, k: Tensor, query_gate: Tensor | None, key_bias: Tensor | None, scale: float) -> Tensor:
    logits = (q @ k.transpose(-1, -2)) * scale
    if query_gate is not None and key_bias is not None:
        logits = logits + query_gate[:, None, :, None] * key_bias[:, None, None, :]
    return logits


def mask_attention(
    q: Tensor, k: Tensor, v: Tensor, query_gate: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, D) in q's dtype and log-sum-exp (B, H, Nq). A row whose logits are all -inf gives 0."""
    dtype = accumulation_dtype(q.dtype)
    logits = _logits(q.to(dtype), k.to(dtype), query_gate, key_bias, scale)
    highest = logits.amax(-1, keepdim=True)
    p = torch.exp(logits - highest.masked_fill(highest == -torch.inf, 0))
    total = p.sum(-1, keepdim=True)
    out = (p @ v.to(dtype)) / total.masked_fill(total == 0, 1)
    return out.to(q.dtype), (highest + total.log()).squeeze(-1)


def mask_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_gate: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, query_gate, key_bias.

    With P the softmax and S the logits: dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(dO * O) + dlse),
    dQ = scale dS K, dK = scale dS^T Q, dr_i = sum_hj dS_ij c_j, dc_j = sum_hi dS_ij r_i.
    """
    dtype = accumulation_dtype(q.dtype)
    q_, k_, v_, out_, d_out_ = (x.to(dtype) for x in (q, k, v, out, d_out))
    logits = _logits(q_, k_, query_gate, key_bias, scale)
    p = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    delta = (d_out_ * out_).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse
    d_logits = p * (d_out_ @ v_.transpose(-1, -2) - delta.unsqueeze(-1))
    d_q = (d_logits @ k_ * scale).to(q.dtype)
    d_k = (d_logits.transpose(-1, -2) @ q_ * scale).to(k.dtype)
    d_v = (p.transpose(-1, -2) @ d_out_).to(v.dtype)
    if query_gate is None or key_bias is None:
        return d_q, d_k, d_v, None, None
    over_heads = d_logits.sum(1)
    return d_q, d_k, d_v, (over_heads @ key_bias.unsqueeze(-1)).squeeze(-1), (query_gate.unsqueeze(1) @ over_heads).squeeze(1)
