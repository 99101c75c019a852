"""All tensors of a prediction in one .npz."""

from __future__ import annotations

from pathlib import Path

from ..data.frames import Frames
from ..prediction import Prediction
from ._views import check


def write_npz(path: str | Path, prediction: Prediction, frames: Frames) -> list[Path]:
    """What `Prediction.save` writes and `Prediction.load` reads."""
    check(prediction, frames)
    return [prediction.save(path)]
