"""Cameras as a TUM trajectory and a JSON file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.frames import Frames
from ..files import AtomicFiles
from ..geometry import matrix_to_quaternion
from ..prediction import Prediction
from .scene import scene_cameras

CONVENTION = (
    "OpenCV (x right, y down, z forward); extrinsics are camera-from-world, 3 x 4: x_cam = R x_world + t; translations in scene units; "
    "intrinsics in pixels of the original image (its width and height are given), the centre of its first pixel is (0, 0); null = not "
    "finite; 'network' has the same for the frame as the network saw it, the resolution of depth/ and mask/ and the pixels of "
    "tracks_processed, where the centre of the first pixel is (0, 0) too: network = (original + 0.5) * scale + offset - 0.5 for x and "
    "for y, and original = (network + 0.5 - offset) / scale - 0.5"
)

log = logging.getLogger(__name__)


def write_trajectory(out_dir: str | Path, prediction: Prediction, frames: Frames) -> list[Path]:
    """Write `trajectory.tum` (timestamp tx ty tz qx qy qz qw, world-from-camera, one line per frame) and `cameras.json`.

    Intrinsics in the JSON are in pixels of the original images. Those under "network" are in pixels of the network's input, with the map
    between the two. The centre of the first pixel is (0, 0) in both. Returns the paths.
    """
    cameras = scene_cameras(prediction, frames)
    height, width = prediction.images.shape[-2:]
    if not np.isfinite(cameras.original).all():
        log.warning("some cameras have a field of view of 0, so an infinite focal length: it is null in cameras.json")
    poses = torch.from_numpy(cameras.world_from_camera)[:, :3]
    quaternions = matrix_to_quaternion(poses[..., :3])
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for timestamp, values in zip(frames.timestamps, torch.cat([poses[..., 3], quaternions], -1).tolist(), strict=True):
        lines.append(" ".join([f"{timestamp:.6f}", *(f"{value:.9g}" for value in values)]))
    entries = [
        {
            "name": frames.names[i],
            "timestamp": frames.timestamps[i],
            "width": frames.original_sizes[i][1],
            "height": frames.original_sizes[i][0],
            "extrinsics": _rows(cameras.extrinsics[i]),
            "intrinsics": _rows(cameras.original[i]),
            "network": {
                "width": width,
                "height": height,
                "intrinsics": _rows(cameras.network[i]),
                "scale": frames.scale[i].tolist(),
                "offset": frames.offset[i].tolist(),
            },
        }
        for i in range(len(frames))
    ]
    with AtomicFiles() as files:
        files.add(Path(out_dir) / "trajectory.tum").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = json.dumps({"convention": CONVENTION, "frames": entries}, indent=1, allow_nan=False)
        files.add(Path(out_dir) / "cameras.json").write_text(text + "\n", encoding="utf-8")
    return files.paths


def _rows(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    """The matrix as lists, with None for numbers that are not finite, which JSON does not have."""
    finite = np.isfinite(matrix).tolist()
    return [[v if ok else None for v, ok in zip(row, oks, strict=True)] for row, oks in zip(matrix.tolist(), finite, strict=True)]
