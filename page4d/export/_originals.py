"""Maps of the network's size in the pixels of the original pictures, and the pictures beside them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.frames import Frames
from ..data.images import stored_size
from ..data.originals import check_original, each_original, link_suffix
from ..files import AtomicFiles
from ..prediction import Prediction
from .views import depth_map, is_depth, smooth_motion

Map = NDArray[np.float32]

BAND_PIXELS = 1 << 20  # that are resampled at a time
AGREE = 1.05  # neighbours whose depths differ by more than this factor are two surfaces, between which nothing is interpolated


def original_depth(prediction: Prediction, frames: Frames, index: int) -> NDArray[np.float32]:
    """The depth (h, w) of a frame in pixels of its original, 0 where nothing is known: invalid, cropped away or padding.

    Bilinear inside a surface, nearest at its edges.
    """
    depth = depth_map(prediction, frames, index)

    def mix(around: list[Map], weights: list[Map], nearest: Map) -> Map:
        least, most = np.minimum.reduce(around), np.maximum.reduce(around)
        return np.where((least > 0) & (most <= AGREE * least), _weighted(around, weights), nearest)

    return _resampled(np.where(is_depth(depth), depth, 0).astype(np.float32), frames, index, mix)


def original_motion(prediction: Prediction, frames: Frames, index: int) -> NDArray[np.float32]:
    """The motion (h, w) of a frame in pixels of its original, bilinear; 0 where nothing is known."""
    return _resampled(smooth_motion(prediction, index), frames, index, lambda around, weights, nearest: _weighted(around, weights))


def _weighted(around: list[Map], weights: list[Map]) -> Map:
    return weights[0] * around[0] + weights[1] * around[1] + weights[2] * around[2] + weights[3] * around[3]


def _resampled(values: Map, frames: Frames, index: int, mix: Callable[[list[Map], list[Map], Map], Map]) -> Map:
    """A map of the network's size in pixels of the original of a frame, 0 where the network did not see it.

    `mix` gets the four neighbours of each pixel, their bilinear weights, and the nearest one, for some rows at a time: a photo of 100
    megapixels would need gigabytes at once.
    """
    rows, columns = (_Axis(frames, index, axis, values.shape[1 - axis]) for axis in (1, 0))
    result = np.zeros((len(rows.low), len(columns.low)), np.float32)
    step = max(1, BAND_PIXELS // len(columns.low))
    for start in range(0, len(result), step):
        band = slice(start, start + step)
        around = [values[np.ix_(r, c)] for r in (rows.low[band], rows.high[band]) for c in (columns.low, columns.high)]
        y, x = rows.fraction[band, None], columns.fraction
        weights = [(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x]
        found = mix(around, weights, values[np.ix_(rows.nearest[band], columns.nearest)])
        np.copyto(result[band], found, where=rows.seen[band, None] & columns.seen)
    return result


class _Axis:
    """For each row (axis 1) or column (axis 0) of an original: its neighbours among `count` in the network's frame."""

    def __init__(self, frames: Frames, index: int, axis: int, count: int):
        scale, offset, last = float(frames.scale[index, axis]), float(frames.offset[index, axis]), count - 1
        place = (np.arange(frames.original_sizes[index][1 - axis]) + 0.5) * scale + offset - 0.5
        self.seen = (place >= -0.5) & (place <= last + 0.5)
        place = place.clip(0, last)
        self.low = np.minimum(place.astype(int), max(0, last - 1))
        self.high = np.minimum(self.low + 1, last)
        self.fraction = (place - self.low).astype(np.float32)  # of the way from `low` to `high`
        self.nearest = np.round(place).astype(int)


def static_mask(prediction: Prediction, frames: Frames, index: int, moving: float) -> Image.Image:
    """The mask that COLMAP and nerfstudio read, at the size of the original: 0 = moving and to be ignored, 255 = static."""
    return Image.fromarray(np.where(original_motion(prediction, frames, index) > moving, 0, 255).astype(np.uint8))


def picture_names(frames: Frames) -> list[str]:
    """The name of each original picture in a folder of pictures: that of the frame, with the suffix of a linked file or .jpg.

    Blanks become underscores, as they end a name in COLMAP's text files. The names differ also without their suffixes.
    """
    suffixes = [link_suffix(page) or ".jpg" for page in frames.pages] or [".png"] * len(frames)
    stems = [re.sub(r"\s", "_", name) for name in frames.names]
    if len({stem.lower() for stem in stems}) < len(stems):
        stems = [f"{i:06d}_{stem}" for i, stem in enumerate(stems)]
    return [stem + suffix for stem, suffix in zip(stems, suffixes, strict=True)]


def write_pictures(folder: Path, names: list[str], frames: Frames, files: AtomicFiles, chosen: list[int]) -> None:
    """Write the original pictures of the chosen frames into a folder.

    They are links to the files where every tool reads these as they are. Others, and frames of a video, are upright JPEGs of quality 95
    without subsampling. Frames made in memory are PNGs.
    """
    left = []
    for i in chosen:
        if frames.pages and link_suffix(frames.pages[i]):
            check_original(frames, i, stored_size(frames.pages[i].path))
            _link(frames.pages[i].path, files.add(folder / names[i]))
        else:
            left.append(i)
    each_original(frames, lambda i, picture: picture.save(files.add(folder / names[i]), **_quality(names[i])), left)


def _link(target: Path, path: Path) -> None:
    try:
        os.symlink(os.path.realpath(target), path)
    except OSError:  # a file system without links
        shutil.copyfile(target, path)


def _quality(name: str) -> dict[str, Any]:
    return {"quality": 95, "subsampling": 0} if name.endswith(".jpg") else {}
