"""Maps of the network's size in the pixels of the original pictures, and the pictures beside them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.frames import Frames
from ..data.originals import each_original, linkable
from ..files import AtomicFiles
from ..prediction import Prediction
from .views import depth_map, is_depth, motion_map

AGREE = 1.05  # neighbours whose depths differ by more than this factor are two surfaces, between which nothing is interpolated


def original_depth(prediction: Prediction, frames: Frames, index: int) -> NDArray[np.float32]:
    """The depth (h, w) of a frame in pixels of its original, 0 where nothing is known: invalid, cropped away or padding.

    Bilinear inside a surface, nearest at its edges.
    """
    depth = depth_map(prediction, frames, index)
    depth = np.where(is_depth(depth), depth, 0).astype(np.float32)
    (corners, weights), nearest, seen = _lookup(frames, index, depth.shape)
    around = [depth[rows, columns] for rows, columns in corners]
    least, most = np.minimum.reduce(around), np.maximum.reduce(around)
    smooth = sum(weight * value for weight, value in zip(weights, around, strict=True))
    result = np.where((least > 0) & (most <= AGREE * least), smooth, depth[nearest])
    return np.where(seen, result, 0).astype(np.float32)


def original_motion(prediction: Prediction, frames: Frames, index: int) -> NDArray[np.float32]:
    """The motion (h, w) of a frame in pixels of its original, bilinear; 0 where nothing is known."""
    motion = motion_map(prediction, frames, index)
    (corners, weights), _, seen = _lookup(frames, index, motion.shape)
    smooth = sum(weight * motion[rows, columns] for weight, (rows, columns) in zip(weights, corners, strict=True))
    return np.where(seen, smooth, 0).astype(np.float32)


def _lookup(frames: Frames, index: int, size: tuple[int, ...]) -> tuple[tuple[list[Any], list[Any]], Any, NDArray[np.bool_]]:
    """For each pixel of an original: four neighbours in the network's frame with their weights, the nearest one, and whether it is seen."""
    lows, highs, fractions, nearest, seen = [], [], [], [], []
    for axis in (1, 0):  # rows, columns
        scale, offset = float(frames.scale[index, axis]), float(frames.offset[index, axis])
        side, last = frames.original_sizes[index][1 - axis], size[1 - axis] - 1
        place = (np.arange(side) + 0.5) * scale + offset - 0.5
        seen.append((place >= -0.5) & (place <= last + 0.5))
        place = place.clip(0, last)
        low = np.minimum(place.astype(int), max(0, last - 1))
        lows.append(low)
        highs.append(np.minimum(low + 1, last))
        fractions.append((place - low).astype(np.float32))
        nearest.append(np.round(place).astype(int))
    y, x = fractions[0][:, None], fractions[1][None, :]
    corners = [np.ix_(rows, columns) for rows in (lows[0], highs[0]) for columns in (lows[1], highs[1])]
    weights = [(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x]
    return (corners, weights), np.ix_(*nearest), seen[0][:, None] & seen[1][None, :]


def static_mask(prediction: Prediction, frames: Frames, index: int, moving: float) -> Image.Image:
    """The mask that COLMAP and nerfstudio read, at the size of the original: 0 = moving and to be ignored, 255 = static."""
    return Image.fromarray(np.where(original_motion(prediction, frames, index) > moving, 0, 255).astype(np.uint8))


def picture_names(frames: Frames) -> list[str]:
    """The name of each original picture in a folder of pictures: that of the frame, with the suffix of a linked file or .jpg.

    Blanks become underscores, as they end a name in COLMAP's text files.
    """
    suffixes = [page.path.suffix if linkable(page) else ".jpg" for page in frames.pages] or [".png"] * len(frames)
    names = [re.sub(r"\s", "_", name) + suffix for name, suffix in zip(frames.names, suffixes, strict=True)]
    return names if len({name.lower() for name in names}) == len(names) else [f"{i:06d}_{name}" for i, name in enumerate(names)]


def write_pictures(folder: Path, names: list[str], frames: Frames, files: AtomicFiles, chosen: list[int]) -> None:
    """Write the original pictures of the chosen frames into a folder.

    They are links to the files where every tool reads these as they are. Others, and frames of a video, are upright JPEGs of quality 95
    without subsampling. Frames made in memory are PNGs.
    """
    left = []
    for i in chosen:
        if frames.pages and linkable(frames.pages[i]):
            _link(frames.pages[i].path, files.add(folder / names[i]))
        else:
            left.append(i)
    each_original(frames, lambda i, picture: picture.save(files.add(folder / names[i]), **_quality(names[i])), left)


def _link(target: Path, path: Path) -> None:
    try:
        os.symlink(os.path.abspath(target), path)
    except OSError:  # a file system without links
        shutil.copyfile(target, path)


def _quality(name: str) -> dict[str, Any]:
    return {"quality": 95, "subsampling": 0} if name.endswith(".jpg") else {}
