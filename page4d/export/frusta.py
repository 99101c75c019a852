"""Camera frusta as lines, for the formats that draw them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.frames import Frames
from ..prediction import Prediction
from ._percentiles import percentiles
from .scene import SceneCameras
from .views import depth_map, is_depth

LENGTH = 0.06  # of a frustum, in median depths of the clip


def frustum_length(prediction: Prediction, frames: Frames) -> float:
    """How far a drawn frustum reaches, in scene units."""

    def depths() -> Iterator[NDArray[Any]]:
        for i in range(len(frames)):
            depth = depth_map(prediction, frames, i)
            yield depth[is_depth(depth)]

    return LENGTH * (percentiles(depths, [50]) or [1.0])[0]


def frustum_corners(cameras: SceneCameras, frames: Frames, index: int, length: float) -> NDArray[np.float64]:
    """The corners (4, 3) of the original picture in the world, at `length` along the camera's z, clockwise from the top left."""
    height, width = frames.original_sizes[index]
    pixels = np.array([[-0.5, -0.5, 1], [width - 0.5, -0.5, 1], [width - 0.5, height - 0.5, 1], [-0.5, height - 0.5, 1]])
    rays = pixels @ np.linalg.inv(cameras.original[index]).T
    pose = cameras.world_from_camera[index]
    return rays * length @ pose[:3, :3].T + pose[:3, 3]


def frustum_segments(cameras: SceneCameras, frames: Frames, index: int, length: float) -> NDArray[np.float64]:
    """The eight edges (8, 2, 3) of a frustum: from the centre to the corners, and from each corner to the next."""
    corners = frustum_corners(cameras, frames, index, length)
    centre = np.broadcast_to(cameras.world_from_camera[index, :3, 3], corners.shape)
    return np.concatenate([np.stack([centre, corners], 1), np.stack([corners, np.roll(corners, -1, 0)], 1)])
