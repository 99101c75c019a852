"""A coloured point cloud as binary PLY."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from .scene import Points, confident_points, gather

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
    than `max_points`, every frame gives the same share, at random with a fixed seed. `source` is that of `Prediction.points`.
    """
    parts = confident_points(prediction, frames, max_points=max_points, source=source, confidence_percentile=confidence_percentile)
    points, _ = gather(parts, min(max_points, prediction.images[0, :, 0].numel()))
    if not len(points.xyz):
        log.warning("%s: no finite points to write, the point cloud is empty", path)
    with AtomicFiles() as files:
        write_vertices(files.add(Path(path)), points)
    return files.paths


def write_vertices(path: Path, points: Points, turn: NDArray[np.float64] | None = None) -> None:
    """Write points into a file. `turn` (3, 3) changes the axes of the world."""
    vertices = np.empty(len(points.xyz), VERTEX)
    vertices["xyz"] = points.xyz if turn is None else points.xyz @ turn.T
    vertices["rgb"], vertices["confidence"] = points.rgb, points.confidence
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        "property float confidence\nend_header\n"
    )
    path.write_bytes(header.encode("ascii") + vertices.tobytes())
