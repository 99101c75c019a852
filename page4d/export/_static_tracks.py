"""Tracks of what stands still, as points of the world: each with the frames that see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.frames import Frames
from ..prediction import Prediction
from .scene import SceneCameras
from .track_points import track_points
from .views import frame_pixels, motion_map


@dataclass(frozen=True)
class StaticTracks:
    """N points that S frames see. There may be none."""

    xyz: NDArray[np.float64]  # (N, 3) in the world
    rgb: NDArray[np.uint8]  # (N, 3), in the first frame that sees the point
    error: NDArray[np.float64]  # (N,): mean distance of its projections from its track, in pixels of the originals
    seen: NDArray[np.bool_]  # (S, N)
    xy: NDArray[np.float64]  # (S, N, 2) in pixels of the originals


def static_tracks(prediction: Prediction, frames: Frames, cameras: SceneCameras, moving: float) -> StaticTracks:
    """The tracks that at least two frames see on known depth and in front of them, and none of them on a pixel that moves.

    The point is the median of what the frames say of it: their depth at the track, unprojected.
    """
    found = track_points(prediction, frames, cameras)
    seen, places, xy = found.seen, found.xyz, found.xy
    colors, moved = np.zeros((*seen.shape, 3), np.uint8), np.zeros(seen.shape[1], bool)
    for i in np.flatnonzero(seen.any(1)).tolist():
        columns, rows = found.pixels[i].T
        colors[i] = frame_pixels(prediction, i)[rows, columns]
        if prediction.mask is not None:
            moved |= seen[i] & (motion_map(prediction, frames, i)[rows, columns] > moving)
    kept = np.flatnonzero((seen.sum(0) >= 2) & ~moved)
    seen, places, xy = seen[:, kept], places[:, kept], xy[:, kept]
    xyz = np.array([np.median(places[seen[:, n], n], axis=0) for n in range(len(kept))]).reshape(-1, 3)
    depths = np.einsum("sj,nj->sn", cameras.extrinsics[:, 2, :3], xyz) + cameras.extrinsics[:, 2, 3, None]
    front = np.flatnonzero(((depths > 0) | ~seen).all(0))
    kept, seen, xyz, xy = kept[front], seen[:, front], xyz[front], xy[:, front]
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
