"""Tracks of what stands still, as points of the world: each with the frames that see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.frames import Frames
from ..prediction import Prediction
from .scene import SceneCameras
from .views import VISIBLE, array, depth_map, frame_pixels, is_depth, motion_map


@dataclass(frozen=True)
class StaticTracks:
    """N points that S frames see. There may be none."""

    xyz: NDArray[np.float64]  # (N, 3) in the world
    rgb: NDArray[np.uint8]  # (N, 3), in the first frame that sees the point
    error: NDArray[np.float64]  # (N,): mean distance of its projections from its track, in pixels of the originals
    seen: NDArray[np.bool_]  # (S, N)
    xy: NDArray[np.float64]  # (S, N, 2) in pixels of the originals


def static_tracks(prediction: Prediction, frames: Frames, cameras: SceneCameras, moving: float) -> StaticTracks:
    """The tracks that at least two frames see on known depth, and none of them on a pixel that moves.

    The point is the median of what the frames say of it: their depth at the track, unprojected.
    """
    count = 0 if prediction.track is None else prediction.track.shape[2]
    seen, places = np.zeros((len(frames), count), bool), np.zeros((len(frames), count, 3))
    colors, moved = np.zeros((len(frames), count, 3), np.uint8), np.zeros(count, bool)
    if not count:
        return StaticTracks(places[0], colors[0], np.zeros(0), seen, places[..., :2])
    assert prediction.track is not None
    xy = array(prediction.track).astype(np.float64)
    visible = np.ones(seen.shape, bool) if prediction.vis is None else array(prediction.vis) >= VISIBLE
    for i in np.flatnonzero(cameras.finite).tolist():
        depth = depth_map(prediction, frames, i)
        near = np.round(np.nan_to_num(xy[i], nan=-1, posinf=-1, neginf=-1)).astype(int)
        inside = ((near >= 0) & (near < depth.shape[::-1])).all(1)
        columns, rows = np.where(inside[:, None], near, 0).T
        z = depth[rows, columns]
        seen[i] = visible[i] & inside & is_depth(z)
        rays = np.linalg.solve(cameras.network[i], np.concatenate([xy[i], np.ones((count, 1))], 1).T).T
        camera = np.where(seen[i, :, None], rays * z[:, None], 0)
        places[i] = (camera - cameras.extrinsics[i, :, 3]) @ cameras.extrinsics[i, :, :3]
        colors[i] = frame_pixels(prediction, i)[rows, columns]
        if prediction.mask is not None:
            moved |= seen[i] & (motion_map(prediction, frames, i)[rows, columns] > moving)
    kept = np.flatnonzero((seen.sum(0) >= 2) & ~moved)
    seen, places, xy = seen[:, kept], places[:, kept], xy[:, kept]
    xyz = np.array([np.median(places[seen[:, n], n], axis=0) for n in range(len(kept))]).reshape(-1, 3)
    original = np.stack([frames.to_original(xy[i], i) for i in range(len(frames))])
    return StaticTracks(xyz, colors[seen.argmax(0), kept], _error(xyz, original, seen, cameras), seen, original)


def _error(xyz: NDArray[np.float64], xy: NDArray[np.float64], seen: NDArray[np.bool_], cameras: SceneCameras) -> NDArray[np.float64]:
    total = np.zeros(len(xyz))
    for i in np.flatnonzero(cameras.finite).tolist():
        camera = xyz @ cameras.extrinsics[i, :, :3].T + cameras.extrinsics[i, :, 3]
        pixels = camera @ cameras.original[i].T
        distance = np.linalg.norm(pixels[:, :2] / pixels[:, 2:] - xy[i], axis=1)
        total += np.where(seen[i], distance, 0)
    return total / np.maximum(1, seen.sum(0))
