"""The points of a clip, divided into what stands still and what moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.frames import Frames
from ..export.scene import confident_points, gather
from ..export.views import motion_map
from ..prediction import Prediction

MAX_POINTS = 3_000_000  # of the clip; every frame gives the same share


@dataclass(frozen=True)
class Colored:
    """N points."""

    xyz: NDArray[np.float32]  # (N, 3) in the world: axes of the first camera, scene units
    rgb: NDArray[np.uint8]  # (N, 3)


@dataclass(frozen=True)
class Cloud:
    """N points of S frames, those of a frame one after the other."""

    xyz: NDArray[np.float32]  # (N, 3) in the world
    rgb: NDArray[np.uint8]  # (N, 3)
    confidence: NDArray[np.float32]  # (N,)
    motion: NDArray[np.float32]  # (N,) in 0 to 1; -1 without a dynamics mask
    ends: NDArray[np.int64]  # (S,): the end of each frame

    def split(self, percentile: float, moving: float, most: int) -> tuple[Colored, list[Colored]]:
        """The static points of all frames, and the moving points of each.

        Args:
            percentile: of the confidence, 0 to 100. Points below it are left out.
            moving: motion above which a point moves.
            most: number of static points. If there are more, some are left out at random, with a fixed seed.
        """
        if not len(self.xyz):
            return self._part(np.zeros(0, np.int64)), [self._part(np.zeros(0, np.int64)) for _ in self.ends]
        kept = self.confidence >= np.percentile(self.confidence, percentile)
        moves = self.motion > moving
        static = np.flatnonzero(kept & ~moves)
        if len(static) > most:
            static = np.sort(np.random.default_rng(0).choice(static, most, replace=False))
        places = np.flatnonzero(kept & moves)
        return self._part(static), [self._part(part) for part in np.split(places, np.searchsorted(places, self.ends[:-1]))]

    def _part(self, places: NDArray[np.int64]) -> Colored:
        return Colored(self.xyz[places], self.rgb[places])


def load_cloud(prediction: Prediction, frames: Frames) -> Cloud:
    """All points of a clip with known depth, at most `MAX_POINTS`."""
    parts = confident_points(prediction, frames, max_points=MAX_POINTS, confidence_percentile=0)
    points, counts = gather(parts, min(MAX_POINTS, prediction.images[0, :, 0].numel()))
    motion, ends = np.full(len(points.xyz), -1, np.float32), np.cumsum(counts)
    if prediction.mask is not None:
        for i, (count, end) in enumerate(zip(counts, ends.tolist(), strict=True)):
            columns, rows = points.pixels[end - count : end].T
            motion[end - count : end] = motion_map(prediction, frames, i)[rows, columns]
    return Cloud(points.xyz, points.rgb, points.confidence, motion, ends)
