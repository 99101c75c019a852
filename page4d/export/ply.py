"""A coloured point cloud as binary PLY."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from ._color import to_uint8
from ._views import array, check

VERTEX = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3), ("confidence", "<f4")])

log = logging.getLogger(__name__)


def write_ply(
    path: str | Path,
    prediction: Prediction,
    frames: Frames,
    *,
    source: str = "depth",
    confidence_percentile: float = 50.0,
    max_points: int = 2_000_000,
) -> list[Path]:
    """Write the points of all frames in the world (axes of the first camera, scene units), with colour and confidence. Returns the path.

    Keeps finite points that show the image (not its padding) and whose confidence is at or above the given percentile of the clip. Of more
    than `max_points`, a random subset is kept, with a fixed seed. `source` is that of `Prediction.points`.
    """
    vertices = confident_points(prediction, frames, source=source, confidence_percentile=confidence_percentile, max_points=max_points)
    if not len(vertices):
        log.warning("%s: no finite points to write, the point cloud is empty", path)
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        "property float confidence\nend_header\n"
    )
    with AtomicFiles() as files:
        files.add(Path(path)).write_bytes(header.encode("ascii") + vertices.tobytes())
    return files.paths


def confident_points(prediction: Prediction, frames: Frames, *, source: str, confidence_percentile: float, max_points: int) -> NDArray[Any]:
    """The points that `write_ply` writes, as a structured array (N,) with the fields of `VERTEX`."""
    check(prediction, frames, *(("depth", "depth_conf", "pose_enc") if source == "depth" else ()))
    point_map, confidence_map = prediction.points(source)
    points, confidence = array(point_map).reshape(-1, 3), array(confidence_map).reshape(-1)
    keep = np.isfinite(points).all(-1) & np.isfinite(confidence) & frames.inside().numpy().reshape(-1)
    if keep.any():
        keep &= confidence >= np.percentile(confidence[keep], confidence_percentile)
    chosen = np.flatnonzero(keep)
    if len(chosen) > max_points:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, max_points, replace=False))
    vertices = np.empty(len(chosen), VERTEX)
    vertices["xyz"], vertices["confidence"] = points[chosen], confidence[chosen]
    vertices["rgb"] = to_uint8(rearrange(array(prediction.images), "s c h w -> (s h w) c")[chosen])
    return vertices
