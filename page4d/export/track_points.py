"""Point tracks in the world: what each frame says of each track."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.frames import Frames
from ..prediction import Prediction
from .scene import SceneCameras
from .views import VISIBLE, array, depth_map, is_depth


@dataclass(frozen=True)
class TrackPoints:
    """N tracks over S frames. There may be none."""

    xy: NDArray[np.float64]  # (S, N, 2) in pixels of the network's input
    xyz: NDArray[np.float64]  # (S, N, 3) in the world, where `seen`
    seen: NDArray[np.bool_]  # (S, N): the point is visible in the frame, on known depth, and the camera is finite
    pixels: NDArray[np.int64]  # (S, N, 2): x, y of the nearest pixel, 0 outside the frame


def track_points(prediction: Prediction, frames: Frames, cameras: SceneCameras) -> TrackPoints:
    """The tracks of a prediction, unprojected with the depth of their nearest pixels."""
    count = 0 if prediction.track is None else prediction.track.shape[2]
    shape = (len(frames), count)
    xy = np.zeros((*shape, 2)) if prediction.track is None else array(prediction.track).astype(np.float64)
    visible = np.ones(shape, bool) if prediction.vis is None or not count else array(prediction.vis) >= VISIBLE
    seen, xyz, pixels = np.zeros(shape, bool), np.zeros((*shape, 3)), np.zeros((*shape, 2), np.int64)
    for i in np.flatnonzero(cameras.finite).tolist() if count else []:
        depth = depth_map(prediction, frames, i)
        near = np.round(np.nan_to_num(xy[i], nan=-1, posinf=-1, neginf=-1)).astype(int)
        inside = ((near >= 0) & (near < depth.shape[::-1])).all(1)
        pixels[i] = np.where(inside[:, None], near, 0)
        z = depth[pixels[i, :, 1], pixels[i, :, 0]]
        seen[i] = visible[i] & inside & is_depth(z)
        rays = np.linalg.solve(cameras.network[i], np.concatenate([xy[i], np.ones((count, 1))], 1).T).T
        camera = np.where(seen[i, :, None], rays * z[:, None], 0)
        xyz[i] = (camera - cameras.extrinsics[i, :, 3]) @ cameras.extrinsics[i, :, :3]
    return TrackPoints(xy, xyz, seen, pixels)
