"""Rendered scenes, whose truth is exact and complete; nothing to download."""

from __future__ import annotations

from ...data.preprocess import DEFAULT_SIZE, PATCH, Size
from ...data.sample import Sample
from ...errors import InputError
from .base import Dataset

SEQUENCES = 10
FRAMES = 16
TRACKS = 256


def open_synthetic(
    kind: str, *, frames: int | None = None, size: Size | None = None, seed: int = 0, sequences: int | None = None
) -> Dataset:
    """`sequences` scenes of `kind` with `frames` pictures each, drawn at the size at which the network sees them (4:3 if only a width)."""
    from ...data.synthetic import SyntheticScenes

    size = DEFAULT_SIZE if size is None else size
    height, width = (round(size * 0.75 / PATCH) * PATCH, size) if isinstance(size, int) else size
    if kind not in ("static", "dynamic"):
        raise InputError(f"unknown kind of synthetic scenes {kind!r}: use synthetic:static or synthetic:dynamic")
    scenes = SyntheticScenes(kind, frames=frames or FRAMES, size=(height, width), seed=seed, tracks=TRACKS)
    names = tuple(str(i) for i in range(sequences or SEQUENCES))

    def read(sequence: str) -> Sample:
        return scenes[int(sequence)]

    return Dataset(f"synthetic:{kind}", names, read)
