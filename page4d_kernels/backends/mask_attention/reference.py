"""The specification itself. Memory grows with N^2: for tests and small inputs."""

from ...reference.mask_attention import mask_attention, mask_attention_backward
from ..registry import Backend


def _forward(q, k, v, query_gate, key_bias, layout, scale):
    return mask_attention(q, k, v, query_gate, key_bias, scale)


def _backward(q, k, v, query_gate, key_bias, out, lse, d_out, d_lse, layout, scale):
    return mask_attention_backward(q, k, v, query_gate, key_bias, out, lse, d_out, d_lse, scale)


BACKEND = Backend("reference", "plain PyTorch, N x N logits in memory", _forward, _backward)
