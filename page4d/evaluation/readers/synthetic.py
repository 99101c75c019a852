"""Rendered scenes with exact and complete ground truth. Nothing to download."""

from __future__ import annotations

from ...data.preprocess import DEFAULT_SIZE, PATCH
from ...data.sample import Sample
from ...errors import InputError
from .base import Dataset, Request

KINDS = ("static", "dynamic")
SEQUENCES = 10
FRAMES = 16
TRACKS = 256


def open_synthetic(kind: str, request: Request) -> Dataset:
    """Scenes of `kind`, 10 with 16 frames each by default, rendered at the size of the network's input (4:3 for a single number)."""
    from ...data.synthetic import SyntheticScenes

    size = DEFAULT_SIZE if request.size is None else request.size
    height, width = (round(size * 0.75 / PATCH) * PATCH, size) if isinstance(size, int) else size
    if kind not in KINDS:
        raise InputError(f"unknown kind of synthetic scenes {kind!r}: use {' or '.join(f'synthetic:{kind}' for kind in KINDS)}")
    scenes = SyntheticScenes(kind, frames=request.frames or FRAMES, size=(height, width), seed=request.seed, tracks=TRACKS)
    names = tuple(str(i) for i in range(request.sequences or SEQUENCES))

    def read(sequence: str) -> Sample:
        return scenes[int(sequence)]

    return Dataset(f"synthetic:{kind}", names, read)
