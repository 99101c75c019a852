"""Point tracks in viser's scene: what each has passed through in the last frames."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..export.color import distinct
from ..export.track_points import TrackPoints
from ..export.views import TAIL
from .flipbook import Flipbook

MAX_TRACKS = 400
THICKNESS = 3.0  # in pixels of the screen


def add_trails(scene: Any, tracks: TrackPoints) -> Flipbook:
    """`/tracks` with a node of lines per frame. With more than `MAX_TRACKS` tracks, evenly spaced ones are drawn.

    A line joins two neighbouring frames that both see the point.
    """
    book = Flipbook(scene, "/tracks")
    chosen = np.unique(np.linspace(0, tracks.seen.shape[1] - 1, MAX_TRACKS).round().astype(int))
    colors = np.array([distinct(n) for n in chosen.tolist()], np.uint8)
    xyz, seen = tracks.xyz[:, chosen].astype(np.float32), tracks.seen[:, chosen]
    for i in range(1, len(xyz)):
        first = max(0, i - TAIL)
        steps, which = np.nonzero(seen[first:i] & seen[first + 1 : i + 1])
        if len(which):
            segments = np.stack([xyz[first + steps, which], xyz[first + steps + 1, which]], 1)
            both = np.repeat(colors[which, None], 2, 1)
            book.pages[i] = scene.add_line_segments(
                book.page_name(i), segments, both, thickness=THICKNESS, thickness_units="screen", visible=i == book.shown
            )
    return book
