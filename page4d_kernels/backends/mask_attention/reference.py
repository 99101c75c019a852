"""The specification as a backend. Memory grows with N^2, so it is for tests and small inputs."""

from ...reference.mask_attention import mask_attention, mask_attention_backward
from ..registry import Backend
from .problem import AttentionArgs


def _forward(args: AttentionArgs):
    q, k, v, query_gate, key_bias, _, scale = args
    return mask_attention(q, k, v, query_gate, key_bias, scale)


def _backward(args: AttentionArgs, out, lse, d_out, d_lse):
    q, k, v, query_gate, key_bias, _, scale = args
    return mask_attention_backward(q, k, v, query_gate, key_bias, out, lse, d_out, d_lse, scale)


BACKEND = Backend("reference", "plain PyTorch, N x N logits in memory", _forward, _backward, automatic=False)
