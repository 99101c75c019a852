"""Floating-point operations of attention, blocks and models: the "TFLOP/s" of the results. For the other ops see `bandwidth_ops.py`."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from page4d.config import Page4DConfig
from page4d.execution.attention_plan import AttentionPlan, Layer, kept_patches
from page4d.model import Page4D
from page4d_kernels import TokenLayout


def attention_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int, direction: str) -> float:
    """The forward has two matmuls, q k^T and P v; the backward has five. A multiply-add is 2 flops. The bias is not counted."""
    matmuls = {"forward": 2, "backward": 5}[direction]
    return matmuls * 2.0 * batch * heads * queries * keys * head_dim


def trunk_flops(config: Page4DConfig, frames: int, size: tuple[int, int], plan: AttentionPlan | None = None) -> dict[str, float]:
    """Encoder, frame and global blocks over one sequence: matmuls with weights, attention within frames, attention across frames.

    A block's weights cost 2 (4 + 2 mlp_ratio) C^2 flops per token. A query-key pair costs 4 C. `plan`: what the patches of the global
    layers see; the special rows of a layer that is not dense come on top.
    """
    patches = (size[0] // config.patch_size) * (size[1] // config.patch_size)
    in_encoder = 1 + config.register_tokens + patches  # the encoder has its own class and register tokens
    tokens = config.special_tokens + patches
    width, depth = config.embed_dim, config.depth
    weights = 2.0 * (4 + 2 * config.mlp_ratio) * width**2
    embedding = 2.0 * patches * 3 * config.patch_size**2 * width
    return {
        "weights": frames * (embedding + weights * (config.encoder.depth * in_encoder + 2 * depth * tokens)),
        "within frames": frames * 4.0 * width * (config.encoder.depth * in_encoder**2 + depth * tokens**2),
        "across frames": 4.0 * width * sum(_pairs(config, frames, size, kind) for kind in (plan.layers if plan else ("dense",) * depth)),
    }


def _pairs(config: Page4DConfig, frames: int, size: tuple[int, int], kind: Layer) -> float:
    """Query-key pairs of one global layer."""
    grid = (size[0] // config.patch_size, size[1] // config.patch_size)
    layout = TokenLayout(frames, config.special_tokens + grid[0] * grid[1], config.special_tokens)
    if kind == "dense" or frames == 1:
        return float(layout.tokens) ** 2
    special_rows = float(frames * config.special_tokens * layout.tokens)
    if isinstance(kind, tuple):
        kept = frames * config.special_tokens + grid[0] * grid[1] + (frames - 1) * kept_patches(grid, kind)
        return special_rows + float(layout.tokens) * kept
    return special_rows + float(frames) * layout.tokens_per_frame**2


def block_flops(config: Page4DConfig, tokens: int, direction: str) -> float:
    """One block over a sequence. The weights are frozen, so the backward has one matmul per weight, and five in attention."""
    weights = 2.0 * (4 + 2 * config.mlp_ratio) * config.embed_dim**2 * tokens
    return weights + attention_flops(1, config.num_heads, tokens, tokens, config.embed_dim // config.num_heads, direction)


def heads_flops(config: Page4DConfig, frames: int, size: tuple[int, int]) -> dict[str, float]:
    """Camera head and dense heads: torch's count for one frame, times the number of frames."""
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
