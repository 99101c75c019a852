"""What goes into a reconstruction: frames, and points to track."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from page4d_kernels.profiling import stage

from ..config import Page4DConfig
from ..data import Frames, bundled_clip, load_frames
from ..data.images import is_image
from ..data.preprocess import DEFAULT_SIZE, Size
from ..data.sources import Source, resolve
from ..errors import InputError
from ..export import FOLDERS
from ..files import Allocate

DEFAULT_FRAMES = 32
BUNDLED_SIZE = 336  # the bundled clip's own width


def read_inputs(
    inputs: list[str | Path],
    out: Path | None,
    allocate: Allocate | None,
    config: Page4DConfig,
    sampling: dict[str, Any],
    say: Callable[[str], None],
    progress: bool,
) -> Frames:
    """The frames. `allocate` gives the memory of their images. None: ordinary memory."""
    default: Size = DEFAULT_SIZE
    if not inputs:
        inputs = [bundled_clip()]
        say("no input given: using the bundled clip, a rendered scene with a moving camera and moving objects")
        default = BUNDLED_SIZE
    source = resolve(inputs)
    if out is not None:
        _check_out(out, source)
    if sampling["size"] is None:
        sampling = sampling | {"size": config.image_size or default}
    with stage("preprocess"):
        frames = load_frames(source, **sampling, progress=progress, allocate=allocate)
    if frames.known is not None:
        say(f"{len(frames)} cameras were read with the pictures; the network does not see them, and Frames.known keeps them")
    height, width = frames.images.shape[-2:]
    say(f"{count(frames)} at {height} x {width}{_cut(frames)}")
    return frames


def _check_out(out: Path, source: Source) -> None:
    """InputError if results would be written among the files that are read: a later run would read them, or this one replace them."""
    written = {(out / folder).resolve() for folder in FOLDERS}
    if source.cameras is not None:
        folder = source.cameras if source.cameras.is_dir() else source.cameras.parent
        if folder.resolve() in written:
            raise InputError(f"the results would be written beside the input's cameras, in {str(folder)!r}: choose another --out")
    for path in source.paths:
        if is_image(path) and {path.resolve().parent, path.parent.resolve()} & written:
            raise InputError(f"the results would be written among the input's pictures, in {str(path.parent)!r}: choose another --out")


def _cut(frames: Frames) -> str:
    """A note on how much of the worst frame is cropped."""
    size = torch.tensor(frames.original_sizes, dtype=torch.float64).flip(1) * frames.scale  # (S, 2) width, height before the crop
    seen = (torch.tensor(frames.images.shape[:-3:-1]) / size).clamp(max=1).prod(1)
    worst = int(seen.argmin())
    if seen[worst] >= 0.95:
        return ""
    which = "each picture" if seen.max() - seen.min() < 0.01 else f"the picture {frames.names[worst]!r}, the most of all,"
    return f"; {1 - float(seen[worst]):.0%} of {which} is cropped (--fit pad keeps it)"


def count(frames: Frames) -> str:
    return f"{len(frames)} frame" + ("s" if len(frames) > 1 else "")


def query_tensor(frames: Frames, given: Sequence[tuple[float, float]] | None, grid: int | None) -> Tensor | None:
    """(N, 2) in pixels of the processed first frame."""
    height, width = frames.images.shape[-2:]
    if given is not None:
        if grid is not None:
            raise InputError("query points and a track grid exclude each other: give only one of them")
        rows, columns = frames.original_sizes[0]
        points = torch.tensor([list(point) for point in given], dtype=torch.float32).view(-1, 2)
        outside = (points < 0).any(1) | (points[:, 0] > columns - 1) | (points[:, 1] > rows - 1) | ~points.isfinite().all(1)
        if outside.any():
            x, y = points[outside][0].tolist()
            raise InputError(f"query point {x:g},{y:g} is outside the first frame of {rows} x {columns} pixels (height x width)")
        points = frames.points_from_original(points)
        outside = (points < -0.5).any(1) | (points[:, 0] > width - 0.5) | (points[:, 1] > height - 0.5)
        if outside.any():
            x, y = given[int(outside.nonzero()[0])]
            raise InputError(f"query point {x:g},{y:g} is in a cropped part of the frame: use --fit pad, or another point")
        return points
    if grid is None:
        return None
    if grid < 1:
        raise InputError(f"the track grid must be at least 1, not {grid}")
    steps = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(steps * height - 0.5, steps * width - 0.5, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)
