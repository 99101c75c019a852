"""All tensors of a prediction in one .npz file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..data.frames import Frames
from ..prediction import Prediction
from .views import check


def write_npz(path: str | Path, prediction: Prediction, frames: Frames) -> list[Path]:
    """Write the file of `Prediction.save`, which `Prediction.load` reads, with `valid` if the frames have padding. Returns its path."""
    check(prediction, frames)
    inside = frames.inside()[None]
    return [(prediction if inside.all() else replace(prediction, valid=inside)).save(path)]
