"""How many bytes a forward pass without gradients takes beyond the weights, and the pieces it is cut into to stay within a budget.

The trunk goes over frames in pieces, layer by layer; what is there for all frames at once is counted exactly, what a piece needs is
counted by the tensors that are alive at its worst moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .config import DenseHeadConfig, Page4DConfig, TrackHeadConfig

PIECE_TOKENS = 8192  # enough rows for a GPU's matrix unit, and no more than a CPU's last cache or two
HEAD_FRAMES = 8
SAMPLES_IN_FLIGHT = 1 << 26  # values of features that the tracker samples at a time
SPARE = 0.9  # of the free memory: allocators round up


@dataclass(frozen=True)
class Workload:
    """What is asked of a model: sizes and what is computed."""

    config: Page4DConfig
    batch: int
    frames: int
    size: tuple[int, int]
    itemsize: int  # bytes of what the trunk's products run in
    outputs: frozenset[str]
    images_here: bool = True  # in the memory that is counted, and not only a few frames at a time
    results_here: bool = True
    points: int = 0  # tracked per sequence

    @property
    def per_frame(self) -> int:
        patch = self.config.patch_size
        return self.config.special_tokens + (self.size[0] // patch) * (self.size[1] // patch)

    @property
    def all_frames(self) -> int:
        return self.batch * self.frames

    @property
    def kept(self) -> int:
        return 4 if self.outputs & {"depth", "points", "track"} else 1 if "camera" in self.outputs else 0


@dataclass(frozen=True)
class Plan:
    """Frames of a piece in the trunk and in the dense heads, where kept layers lie, and the bytes it should take."""

    trunk_frames: int
    head_frames: int
    offload: bool = False
    bytes: int = 0

    def __str__(self) -> str:
        where = ", kept layers in the host's memory" if self.offload else ""
        return (
            f"{self.bytes / 2**30:.2f} GiB beyond the weights, {self.trunk_frames} frames at a time, {self.head_frames} in the heads{where}"
        )


def make_plan(work: Workload, budget: int | None, can_offload: bool = False) -> Plan:
    """The first of these whose bytes fit the budget: large pieces, smaller ones where that saves memory, the same with kept layers on the
    host; the leanest if none does. Without a budget, large pieces.
    """
    trunk = min(max(1, PIECE_TOKENS // (work.per_frame * work.batch)), work.frames)
    found = []
    for offload in (False, True) if can_offload else (False,):
        plan = _priced(work, Plan(trunk, min(HEAD_FRAMES, work.all_frames), offload))
        while budget is not None and plan.bytes > budget:
            fewer = replace(plan, head_frames=max(1, plan.head_frames // 2)), replace(plan, trunk_frames=max(1, plan.trunk_frames // 2))
            leaner = [other for other in (_priced(work, plan) for plan in fewer) if other.bytes < plan.bytes]
            if not leaner:
                break
            plan = leaner[0]
        if budget is None or plan.bytes <= budget:
            return plan
        found.append(plan)
    return min(found, key=lambda plan: plan.bytes)


def _priced(work: Workload, plan: Plan) -> Plan:
    return replace(plan, bytes=predicted_bytes(work, plan))


def halved(plan: Plan, work: Workload) -> Plan:
    """The plan with pieces of half as many frames."""
    return _priced(work, replace(plan, trunk_frames=max(1, plan.trunk_frames // 2), head_frames=max(1, plan.head_frames // 2)))


def offloaded(plan: Plan, work: Workload) -> Plan:
    """The plan with the kept layers in the host's memory."""
    return _priced(work, replace(plan, offload=True))


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what an allocator says that has no memory left: the CPU's and that of pinned memory raise any RuntimeError."""
    said = isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in str(error) or "out of memory" in str(error))
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def by_pieces(count: int, frames: int, work: Callable[[slice], None], smaller: Callable[[int], int]) -> None:
    """`work` on slices of so many frames, and of as many as `smaller` says from where one runs out of memory, until it is a single frame.

    It has to leave everything as it was if it raises, as it is then called again for fewer frames.
    """
    first = 0
    while first < count:
        piece = slice(first, min(first + frames, count))
        try:
            work(piece)
        except (RuntimeError, MemoryError) as error:
            if frames == 1 or not out_of_memory(error):
                raise
            frames = smaller(frames)
            continue
        first = piece.stop


def predicted_bytes(work: Workload, plan: Plan) -> int:
    """The most that is allocated at once, beyond the weights."""
    config, item = work.config, work.itemsize
    tokens = work.all_frames * work.per_frame
    row = tokens * config.embed_dim  # elements of one tensor (B, S, P, C)
    piece = plan.trunk_frames * work.batch * work.per_frame * config.embed_dim
    height, width = work.size
    pixels = height * width
    images = work.all_frames * 3 * pixels * 4 if work.images_here else 0
    stream = 4 * row
    kept = work.kept * 2 * item * row
    if plan.offload:  # one half on its way to the host
        kept = min(kept, item * row)

    low = 0 if item == 4 else item  # a copy in low precision of what goes into a product
    mlp = 4 + low + 4 + config.mlp_ratio * item * 2  # normalised, cast, the residual, hidden before and after GELU
    attention = 3 * item + 4 + item
    block = piece * max(mlp, attention + 4 * item)
    trunk = kept + stream + max(4 * item * row, 3 * item * row + piece * (4 + low + 5 * item), item * row + block)
    encoder = stream + plan.trunk_frames * 3 * pixels * 4 * 2 + block
    peak = max(trunk, encoder)

    results = 0
    for name, head, channels in (("depth", config.depth_head, 2), ("points", config.point_head, 4)):
        if name in work.outputs and head is not None:
            results += work.all_frames * pixels * channels * 4 if work.results_here else 0
            peak = max(peak, kept + results + plan.head_frames * head_bytes(work, head))
    if work.points and config.track is not None:
        peak = max(peak, kept + results + track_bytes(work, config.track, plan.head_frames))
    return images + peak


def head_bytes(work: Workload, head: DenseHeadConfig) -> int:
    """Of one frame in a dense head: its tokens, and the worst of three moments."""
    pixels, narrow = work.size[0] * work.size[1], head.features // 2
    return max(_fusion_bytes(work, head.out_channels, head.features, narrow, pixels), _token_bytes(work) + 4 * pixels * (narrow + 32 + 32))


def _token_bytes(work: Workload) -> int:
    """The tokens of one frame as a dense head reads them."""
    return 4 * work.per_frame * 2 * work.config.embed_dim * work.itemsize


def _fusion_bytes(work: Workload, channels: tuple[int, int, int, int], features: int, narrow: int, pixels: int) -> int:
    """Of one frame: its tokens, all levels, and their fusion or its growing to so many pixels of `narrow` channels."""
    patches = work.per_frame - work.config.special_tokens
    first, second, third, fourth = channels
    levels = 4 * patches * (16 * first + 4 * second + third + fourth // 4)
    finest = 4 * 64 * patches  # bytes of a channel at twice the finest level
    fusing = finest * features + finest * narrow + 4 * patches * 21 * features
    growing = finest * narrow + 4 * pixels * narrow
    return _token_bytes(work) + levels + max(fusing, growing)


def track_bytes(work: Workload, track: TrackHeadConfig, frames: int) -> int:
    """Of the track head with pieces of so many frames: extracting the feature maps, or following the points in them.

    Maps of all sizes, 4/3 of the largest, stay; the windows around the points are sampled for some frames at a time, twice in memory.
    """
    pixels = (work.size[0] // 2) * (work.size[1] // 2)
    maps = 4 * work.all_frames * track.features * pixels
    frame = _fusion_bytes(work, track.out_channels, track.features, track.features, pixels)
    rest = min(frames, work.all_frames - frames)  # the second piece, at which there are maps of all frames
    extracting = max(frames * frame, maps + rest * frame)
    window, rows = (2 * track.radius + 1) ** 2, work.all_frames * work.points
    sampled = work.points * window * track.features
    sampled *= min(work.all_frames, max(1, SAMPLES_IN_FLIGHT // sampled))
    inputs = 3 * track.features + 4
    correlating = 2 * sampled + 2 * rows * track.levels * window
    updating = 3 * rows * inputs + 12 * work.all_frames * (work.points + track.virtual_tracks) * track.hidden
    following = maps * 4 // 3 + 4 * (max(correlating, updating) + rows * (inputs + track.features))
    return max(extracting, following)


def can_offload(work: Workload, device: torch.device) -> bool:
    """Whether kept layers may go to the host: from a GPU, if there is room for twice their size: pinned memory comes in powers of two."""
    room = budget_of(torch.device("cpu"))
    tokens = work.all_frames * work.per_frame * work.config.embed_dim
    return device.type == "cuda" and (room is None or work.kept * 2 * work.itemsize * tokens * 2 <= room)


def budget_of(device: torch.device) -> int | None:
    """Bytes to plan for: most of what is free on a GPU, or of the memory that the system or the container has. None if nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SPARE * (free + reusable))
    free_here = [x for x in (_free_of_system(), free_of_container(Path("/sys/fs/cgroup"))) if x is not None]
    return int(SPARE * min(free_here)) if free_here else None


def _free_of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names else 0
        return pages * os.sysconf("SC_PAGE_SIZE") // 2 if pages else None


def free_of_container(group: Path) -> int | None:
    """What the control group at this path may still take, files in its cache not counted; None if it has no limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = int((group / limit).read_text()), int((group / usage).read_text())
            stat = dict(line.split() for line in (group / limit).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        return max(0, most - used + int(stat.get(cache, 0)))
    return None
