"""Floating-point operations and the fewest bytes of each op: what "TFLOP/s" and "GB/s" in the results mean."""

from __future__ import annotations


def attention_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int, direction: str) -> float:
    """q k^T and P v are two products, 2 flops a term; the backward has five. The bias is not counted."""
    products = {"forward": 2, "backward": 5}[direction]
    return products * 2.0 * batch * heads * queries * keys * head_dim


def mask_head_bytes(tokens: int, channels: int, itemsize: int) -> float:
    """The tokens, read twice: once for the statistics, once for the head. The key bias is 1/channels of that."""
    return 2.0 * tokens * channels * itemsize


def qk_norm_rope_bytes(tokens: int, heads: int, head_dim: int, itemsize: int) -> float:
    """q and k, read once and written once; v stays where it is."""
    return 4.0 * tokens * heads * head_dim * itemsize
