"""The memory plan: how many bytes a forward pass without gradients needs beyond the weights, and into how many chunks it is cut.

The trunk runs layer by layer, and each layer runs in chunks of frames. Tensors that hold all frames are counted exactly. A chunk is
counted at its peak, by the tensors that are alive then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..config import DenseHeadConfig, Page4DConfig, TrackHeadConfig
from ..system import budget_of as budget_of
from ..system import free_of_container as free_of_container
from ..system import ranks_of_a_node

CHUNK_TOKENS = 8192  # enough rows to fill a GPU, few enough for the caches of a CPU
HEAD_FRAMES = 8
SAMPLES_IN_FLIGHT = 1 << 26  # feature values that the tracker samples at a time
FP32 = 4  # bytes


@dataclass(frozen=True)
class Share:
    """What a rank has to do with the frames of others, see `across.Mesh`."""

    total: int  # frames of the sequence
    row: int  # of this rank's row of the mesh
    largest: int  # of the largest row
    heads: int  # ranks of a row, which divide the heads
    rings: int  # rows


@dataclass(frozen=True)
class Workload:
    """The sizes of a forward pass and the outputs that it computes. On several ranks, those of one rank."""

    config: Page4DConfig
    batch: int
    frames: int
    size: tuple[int, int]
    itemsize: int  # bytes per value of the trunk's matmuls
    outputs: frozenset[str]
    images_on_device: bool = True  # False: the images stay elsewhere, and only a chunk of them is copied to the device
    results_on_device: bool = True  # False: depth and point maps are written elsewhere
    points: int = 0  # tracked per sequence
    kept_keys: float = 0.0  # largest share of the keys that a global layer copies, see `attention_plan.kept_share`
    share: Share | None = None  # None: one rank has all frames

    @property
    def per_frame(self) -> int:
        patch = self.config.patch_size
        return self.config.special_tokens + (self.size[0] // patch) * (self.size[1] // patch)

    @property
    def all_frames(self) -> int:
        return self.batch * self.frames

    @property
    def saved_layers(self) -> int:
        """How many layers the heads read."""
        return 4 if self.outputs & {"depth", "points", "track"} else 1 if "camera" in self.outputs else 0


@dataclass(frozen=True)
class MemoryPlan:
    """Frames per chunk in the trunk and in the dense heads, whether saved layers lie on the host, and the predicted bytes."""

    trunk_frames: int
    head_frames: int
    offload: bool = False
    bytes: int = 0

    def __str__(self) -> str:
        where = ", saved layers in the host's memory" if self.offload else ""
        return (
            f"{self.bytes / 2**30:.2f} GiB beyond the weights, {self.trunk_frames} frames at a time, {self.head_frames} in the heads{where}"
        )


def make_plan(workload: Workload, budget: int | None, can_offload: bool = False) -> MemoryPlan:
    """Try large chunks, then smaller chunks, then host offload. Return the first plan within `budget`, else the smallest.

    Chunks only shrink where that saves memory. Without a budget the chunks are large and nothing is offloaded.
    """
    trunk = min(max(1, CHUNK_TOKENS // (workload.per_frame * workload.batch)), workload.frames)
    smallest = []
    for offload in (False, True) if can_offload else (False,):
        plan = with_bytes(MemoryPlan(trunk, min(HEAD_FRAMES, workload.all_frames), offload), workload)
        while budget is not None and plan.bytes > budget:
            fewer = replace(plan, head_frames=max(1, plan.head_frames // 2)), replace(plan, trunk_frames=max(1, plan.trunk_frames // 2))
            smaller = [other for other in (with_bytes(plan, workload) for plan in fewer) if other.bytes < plan.bytes]
            if not smaller:
                break
            plan = smaller[0]
        if budget is None or plan.bytes <= budget:
            return plan
        smallest.append(plan)
    return min(smallest, key=lambda plan: plan.bytes)


def with_bytes(plan: MemoryPlan, workload: Workload) -> MemoryPlan:
    """The plan with its predicted bytes."""
    return replace(plan, bytes=predicted_bytes(workload, plan))


def with_half_chunks(plan: MemoryPlan) -> MemoryPlan:
    return replace(plan, trunk_frames=max(1, plan.trunk_frames // 2), head_frames=max(1, plan.head_frames // 2))


def with_offload(plan: MemoryPlan) -> MemoryPlan:
    return replace(plan, offload=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed. The CPU allocator and the one of pinned memory raise plain RuntimeErrors, known by their messages."""
    message_matches = isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in str(error) or "out of memory" in str(error))
    return message_matches or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def for_each_chunk(frames: int, chunk_frames: int, step: Callable[[slice], None], on_oom: Callable[[int], int]) -> None:
    """Call `step` on consecutive slices of `chunk_frames` frames.

    On out-of-memory `on_oom(chunk_frames)` returns a smaller number, and the same frames are tried again. A single frame that runs out
    of memory raises. `step` must leave everything unchanged if it raises.
    """
    first = 0
    while first < frames:
        chunk = slice(first, min(first + chunk_frames, frames))
        try:
            step(chunk)
        except (RuntimeError, MemoryError) as error:
            if chunk_frames == 1 or not is_out_of_memory(error):
                raise
            chunk_frames = on_oom(chunk_frames)
            continue
        first = chunk.stop


def predicted_bytes(workload: Workload, plan: MemoryPlan) -> int:
    """Peak bytes beyond the weights: the larger of the trunk's and the heads' peak, plus the images."""
    config = workload.config
    pixels = workload.size[0] * workload.size[1]
    images = workload.all_frames * 3 * pixels * FP32 if workload.images_on_device else 0
    saved = _saved_bytes(workload, plan)
    peak, results = saved + _trunk_bytes(workload, plan), 0
    for name, head, channels in (("depth", config.depth_head, 2), ("points", config.point_head, 4)):
        if name in workload.outputs and head is not None:
            results += workload.all_frames * pixels * channels * FP32 if workload.results_on_device else 0
            peak = max(peak, saved + results + plan.head_frames * head_bytes(workload, head))
    if workload.points and config.track is not None:
        peak = max(peak, saved + results + track_bytes(workload, config.track, plan.head_frames))
    # the encoder runs before any layer is saved
    return images + max(peak, _encoder_bytes(workload, plan))


def _token_values(workload: Workload, frames: int) -> int:
    """Values of one tensor (B, frames, P, C)."""
    return workload.batch * frames * workload.per_frame * workload.config.embed_dim


def _saved_bytes(workload: Workload, plan: MemoryPlan) -> int:
    """The saved layers on the device. With offload only one half of a layer is there, on its way to the host."""
    half = workload.itemsize * _token_values(workload, workload.frames)
    layers = workload.saved_layers * 2 * half
    return min(layers, half) if plan.offload else layers


def _trunk_bytes(workload: Workload, plan: MemoryPlan) -> int:
    """The residual stream, and the largest of three moments of a global block."""
    item, cast = workload.itemsize, _cast_bytes(workload)
    row, chunk = _token_values(workload, workload.frames), _token_values(workload, plan.trunk_frames)
    residual = FP32 * row
    attending = _attention_bytes(workload)
    qkv, qkv_norm_rope = 3 * item, 2 * item  # of a chunk: the packed projection, q and k after QK-norm + RoPE
    projecting = 3 * item * row + chunk * (FP32 + cast + qkv + qkv_norm_rope)
    finishing = item * row + _block_bytes(workload, plan)
    return residual + max(attending, projecting, finishing)


def _attention_bytes(workload: Workload) -> int:
    """Global attention: q, k, v, out of all frames, and the kept keys and values. On several ranks also what is exchanged."""
    item, share, own = workload.itemsize, workload.share, _token_values(workload, workload.frames)
    if share is None:
        return round((4 + 2 * workload.kept_keys) * item * own)
    there = _token_values(workload, share.row) // share.heads  # this rank's heads of all frames of its row
    exchanging = item * max(3 * own + there, 2 * own + 2 * there, own + 3 * there)  # one of q, k, v after the other
    if share.rings == 1:
        return max(exchanging, round((4 + 2 * workload.kept_keys) * item * there))
    block = _token_values(workload, share.largest) // share.heads
    on_the_way = 2 * item * block * min(share.rings - 1, 2)  # keys and values that are used and that arrive
    ring = (3 + 1 + 1) * item * there + FP32 * there + on_the_way  # q, k, v, the rows of q by kind, their output for a block, their sum
    return max(exchanging, ring)


def _encoder_bytes(workload: Workload, plan: MemoryPlan) -> int:
    """The residual stream that the encoder fills, a chunk of images before and after normalisation, and one of its blocks."""
    pictures = plan.trunk_frames * 3 * workload.size[0] * workload.size[1] * FP32
    return FP32 * _token_values(workload, workload.frames) + 2 * pictures + _block_bytes(workload, plan)


def _block_bytes(workload: Workload, plan: MemoryPlan) -> int:
    """One block on a chunk: the larger of its attention and its MLP."""
    item, cast = workload.itemsize, _cast_bytes(workload)
    hidden = workload.config.mlp_ratio * item
    mlp = FP32 + cast + FP32 + 2 * hidden  # normalised, its cast, the residual sum, hidden before and after GELU
    qkv, out = 3 * item, item
    attention = qkv + FP32 + out + 4 * item  # with the residual, and q, k, v, out as attention reads and writes them
    return _token_values(workload, plan.trunk_frames) * max(mlp, attention)


def _cast_bytes(workload: Workload) -> int:
    """Per value: the copy in low precision of a matmul's input. There is none in fp32."""
    return 0 if workload.itemsize == FP32 else workload.itemsize


def head_bytes(workload: Workload, head: DenseHeadConfig) -> int:
    """One frame in a dense head: its tokens, and the largest of fusing, upsampling and predicting."""
    pixels, narrow = workload.size[0] * workload.size[1], head.features // 2
    return max(
        _fusion_bytes(workload, head.out_channels, head.features, narrow, pixels), _token_bytes(workload) + 4 * pixels * (narrow + 32 + 32)
    )


def _token_bytes(workload: Workload) -> int:
    """The tokens of one frame as a dense head reads them."""
    return 4 * workload.per_frame * 2 * workload.config.embed_dim * workload.itemsize


def _fusion_bytes(workload: Workload, channels: tuple[int, int, int, int], features: int, narrow: int, pixels: int) -> int:
    """One frame: its tokens, all levels, and the larger of their fusion and the upsampling to `pixels` of `narrow` channels."""
    patches = workload.per_frame - workload.config.special_tokens
    first, second, third, fourth = channels
    levels = 4 * patches * (16 * first + 4 * second + third + fourth // 4)
    finest = 4 * 64 * patches  # bytes of a channel at twice the finest level
    fusing = finest * features + finest * narrow + 4 * patches * 21 * features
    upsampling = finest * narrow + 4 * pixels * narrow
    return _token_bytes(workload) + levels + max(fusing, upsampling)


def track_bytes(workload: Workload, track: TrackHeadConfig, frames: int) -> int:
    """The track head with chunks of `frames`: the larger of extracting the feature maps and tracking the points in them.

    The pyramid of maps stays in memory: 4/3 of its finest level. The windows around the points are sampled for some frames at a time
    and are in memory twice.
    """
    pixels = (workload.size[0] // 2) * (workload.size[1] // 2)
    maps = 4 * workload.all_frames * track.features * pixels
    frame = _fusion_bytes(workload, track.out_channels, track.features, track.features, pixels)
    rest = min(frames, workload.all_frames - frames)  # the second chunk, when the maps of all frames are allocated
    extracting = max(frames * frame, maps + rest * frame)
    frames = workload.all_frames if workload.share is None else workload.batch * workload.share.total  # tracks are those of all ranks
    window, rows = (2 * track.radius + 1) ** 2, frames * workload.points
    sampled = workload.points * window * track.features
    sampled *= min(workload.all_frames, max(1, SAMPLES_IN_FLIGHT // sampled))
    inputs = 3 * track.features + 4
    correlating = 2 * sampled + 2 * workload.all_frames * workload.points * track.levels * window
    updating = 3 * rows * inputs + 12 * frames * (workload.points + track.virtual_tracks) * track.hidden
    tracking = maps * 4 // 3 + 4 * (max(correlating, updating) + rows * (inputs + track.features))
    return max(extracting, tracking)


def can_offload(workload: Workload, device: torch.device) -> bool:
    """Whether saved layers may move to the host: only from a GPU, and if twice their size is free, as pinned memory is rounded up to a
    power of two. The ranks of a node share its memory.
    """
    room = budget_of(torch.device("cpu"))
    if room is not None and workload.share is not None:
        room //= ranks_of_a_node() or workload.share.heads * workload.share.rings
    tokens = workload.all_frames * workload.per_frame * workload.config.embed_dim
    return device.type == "cuda" and (room is None or workload.saved_layers * 2 * workload.itemsize * tokens * 2 <= room)
