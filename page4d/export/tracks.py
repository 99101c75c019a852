"""Point tracks as arrays and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from .views import array, check, track_picture


def write_tracks(out_dir: str | Path, prediction: Prediction, frames: Frames) -> list[Path]:
    """Write `tracks.npz` and `tracks/<name>.png`. Returns the paths. Positions are x, y, with pixel centres at integers.

    The arrays are tracks (S, N, 2) and query_points (N, 2) in pixels of the original images, with the queries in the first frame;
    tracks_processed (S, N, 2) in pixels of the network's input; and, if predicted, visibility and confidence (S, N) in (0, 1).
    """
    check(prediction, frames, "track")
    assert prediction.track is not None
    track = prediction.track[0].detach().cpu().float()
    queries = track[0] if prediction.query_points is None else prediction.query_points[0].detach().cpu().float()
    arrays: dict[str, Any] = {
        "tracks": frames.points_to_original(track).numpy(),
        "tracks_processed": track.numpy(),
        "query_points": frames.points_to_original(queries.expand(len(frames), -1, -1))[0].numpy(),
    }
    if prediction.vis is not None:
        arrays["visibility"] = array(prediction.vis)
    if prediction.conf is not None:
        arrays["confidence"] = array(prediction.conf)
    with AtomicFiles() as files:
        with open(files.add(Path(out_dir) / "tracks.npz"), "wb") as file:
            np.savez_compressed(file, **arrays)
        for i, name in enumerate(frames.names):
            track_picture(prediction, i).save(files.add(Path(out_dir) / "tracks" / f"{name}.png"))
    return files.paths
