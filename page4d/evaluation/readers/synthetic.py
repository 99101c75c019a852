"""Rendered scenes with exact and complete ground truth. Nothing to download."""

from __future__ import annotations

from ...data.preprocess import DEFAULT_SIZE, PATCH
from ...data.sample import Sample
from ...errors import InputError
from .base import Dataset, Request

WALK = "walk"

KINDS = ("static", "dynamic", WALK)
SEQUENCES = 10
FRAMES = {WALK: 300}  # others 16
TRACKS = {WALK: 0}  # others 256
PEOPLE = {WALK: 3}  # who walk before the camera; other kinds have their own


def open_synthetic(kind: str, request: Request) -> Dataset:
    """Scenes of `kind`, 10 with 16 frames each by default, rendered at the size of the network's input (4:3 for a single number).

    A walk through four rooms has 300 frames by default, is closed, and three people walk before the camera.
    """
    from ...data.synthetic import SyntheticScenes

    size = DEFAULT_SIZE if request.size is None else request.size
    height, width = (round(size * 0.75 / PATCH) * PATCH, size) if isinstance(size, int) else size
    if kind not in KINDS:
        raise InputError(f"unknown kind of synthetic scenes {kind!r}: use {', '.join(f'synthetic:{kind}' for kind in KINDS)}")
    frames, tracks = request.frames or FRAMES.get(kind, 16), TRACKS.get(kind, 256)
    scenes = SyntheticScenes(kind, frames=frames, size=(height, width), seed=request.seed, tracks=tracks, moving=PEOPLE.get(kind))
    names = tuple(str(i) for i in range(request.sequences or SEQUENCES))

    def read(sequence: str) -> Sample:
        return scenes[int(sequence)]

    return Dataset(f"synthetic:{kind}", names, read)
