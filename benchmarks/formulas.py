"""Floating-point operations and the fewest bytes of each op: what "TFLOP/s" and "GB/s" in the results mean."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from page4d.config import Page4DConfig
from page4d.model import Page4D


def attention_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int, direction: str) -> float:
    """q k^T and P v are two products, 2 flops a term; the backward has five. The bias is not counted."""
    products = {"forward": 2, "backward": 5}[direction]
    return products * 2.0 * batch * heads * queries * keys * head_dim


def mask_head_bytes(tokens: int, channels: int, itemsize: int) -> float:
    """The tokens, read twice: once for the statistics, once for the head. The key bias is 1/channels of that."""
    return 2.0 * tokens * channels * itemsize


def mask_head_flops(tokens: int, channels: int, hidden: int, direction: str) -> float:
    """The product with W2, nine taps and the last layer; the backward, from the tokens alone, does it again and has two more of each."""
    return {"forward": 1, "backward": 3}[direction] * 2.0 * tokens * (channels * hidden + 9 * channels + hidden)


def qk_norm_rope_bytes(tokens: int, heads: int, head_dim: int, itemsize: int, direction: str) -> float:
    """q and k, read once and written once; v stays where it is. Backward: both and their gradients read, the projection's written."""
    return {"forward": 4.0, "backward": 7.0}[direction] * tokens * heads * head_dim * itemsize


def residual_norm_bytes(tokens: int, channels: int, itemsize: int, direction: str) -> float:
    """The fp32 stream and the branch in half precision or not: read, and sum and norm written; backward, four are read and two written."""
    whole, half = {"forward": (2, 2), "backward": (3, 3)}[direction]
    return float(tokens * channels * (4 * whole + itemsize * half))


def trunk_flops(config: Page4DConfig, frames: int, size: tuple[int, int]) -> dict[str, float]:
    """Of encoder, frame and global blocks over one sequence: products with weights, attention within frames, attention across them.

    A block's weights are 2 (4 + 2 mlp_ratio) C^2 flops per token; a query-key pair is 4 C.
    """
    patches = (size[0] // config.patch_size) * (size[1] // config.patch_size)
    in_encoder = 1 + config.register_tokens + patches  # its own class and register tokens
    tokens = config.special_tokens + patches
    width, depth = config.embed_dim, config.depth
    weights = 2.0 * (4 + 2 * config.mlp_ratio) * width**2
    embedding = 2.0 * patches * 3 * config.patch_size**2 * width
    return {
        "weights": frames * (embedding + weights * (config.encoder.depth * in_encoder + 2 * depth * tokens)),
        "within frames": frames * 4.0 * width * (config.encoder.depth * in_encoder**2 + depth * tokens**2),
        "across frames": 4.0 * width * depth * (frames * tokens) ** 2,
    }


def block_flops(config: Page4DConfig, tokens: int, direction: str) -> float:
    """One block over a sequence; the backward is of the tokens alone, weights frozen: one product per weight, five in attention."""
    weights = 2.0 * (4 + 2 * config.mlp_ratio) * config.embed_dim**2 * tokens
    return weights + attention_flops(1, config.num_heads, tokens, tokens, config.embed_dim // config.num_heads, direction)


def heads_flops(config: Page4DConfig, frames: int, size: tuple[int, int]) -> dict[str, float]:
    """Of the camera head and of the dense heads, as torch counts them for one frame: they grow with the frames."""
    with torch.device("meta"):
        model = Page4D(config.replace(track=None)).requires_grad_(False)
        patches = (size[0] // config.patch_size) * (size[1] // config.patch_size)
        layers = [torch.empty(1, 1, config.special_tokens + patches, 2, config.embed_dim) for _ in range(4)]
        found = {}
        with torch.no_grad():
            if model.camera_head is not None:
                with FlopCounterMode(display=False) as counter:
                    model.camera_head(layers[-1][:, :, 0].flatten(-2))
                found["camera head"] = float(frames * counter.get_total_flops())
            with FlopCounterMode(display=False) as counter:
                for head in (model.depth_head, model.point_head):
                    if head is not None:
                        head.forward_chunked(layers, config.special_tokens, size)
            found["dense heads"] = float(frames * counter.get_total_flops())
    return found
