"""Synthetic sequences by number, and an endless stream of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ...errors import InputError
from ..sample import Sample
from .render import render
from .scene import KINDS, WALK, random_scene
from .seeds import seeded
from .texture import photographs_in
from .walk import walking_scene

SMALLEST = 8  # side of an image, in pixels


class SyntheticScenes(Dataset[Sample]):
    """Synthetic sequences. Sequence i depends on (kind, seed, i) and the options; the device only affects rounding.

    Tracks, noise and motion blur do not change the scene. Photographs change only its textures.

    Args:
        kind: "static", "dynamic", "mixed", or "walk": through four rooms in a ring, which closes after about 300 frames.
        frames: number of frames S of a sequence.
        size: (H, W) of the images in pixels, at least 8 x 8.
        seed: selects the scenes.
        length: number of sequences.
        tracks: number of points tracked through each sequence.
        moving: number of independently moving objects. None = as `kind` says (a walk has none; three cover up to half of its pictures).
        motion_blur: number of instants that are averaged into a frame. The shutter is open for half the time between frames. 1 = no blur.
        noise: standard deviation of the noise added to images in [0, 1].
        supersample: rays along each side of a pixel.
        photographs: images to use as textures besides the procedural ones, or a folder of images.
        device: where to render.

    Raises:
        InputError: an option is out of range, or the folder has no photographs.
    """

    def __init__(
        self,
        kind: str,
        *,
        frames: int,
        size: tuple[int, int],
        seed: int,
        length: int = 1 << 31,
        tracks: int = 0,
        moving: int | None = None,
        motion_blur: int = 1,
        noise: float = 0.0,
        supersample: int = 1,
        photographs: str | Path | Sequence[Path] | None = None,
        device: torch.device | str = "cpu",
    ):
        if kind not in KINDS:
            raise InputError(f"unknown kind of scene {kind!r}: choose one of {', '.join(KINDS)}")
        if min(frames, length, motion_blur, supersample) < 1 or tracks < 0:
            raise InputError("frames, length, motion_blur and supersample must be at least 1, and tracks at least 0")
        if min(size) < SMALLEST:
            raise InputError(f"images of {size[0]} x {size[1]} pixels are too small: use at least {SMALLEST} x {SMALLEST}")
        if not 0 <= noise <= 1:
            raise InputError(f"noise must be between 0 and 1, not {noise}")
        if moving is not None and moving < 0:
            raise InputError(f"the number of moving objects must be at least 0, not {moving}")
        self.kind, self.frames, self.size, self.seed, self.length = kind, frames, size, seed, length
        self.tracks, self.moving, self.motion_blur, self.noise, self.supersample = tracks, moving, motion_blur, noise, supersample
        self.photographs = photographs_in(photographs) if isinstance(photographs, (str, Path)) else photographs
        self.device = torch.device(device)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.length:
            raise IndexError(f"sequence {i} of {self.length}")
        which, instants = (self.kind, self.seed, i), self.motion_blur
        options: dict[str, Any] = {"photographs": self.photographs, "instants": instants}
        if self.kind == WALK:
            scene = walking_scene(self.frames, seeded("scene", *which), self.moving or 0, **options)
        else:
            scene = random_scene(self.kind, self.frames, seeded("scene", *which), moving=self.moving, **options)
        scene = scene.to(self.device)
        moments = [scene.frames(slice(moment, None, instants)) for moment in range(instants)]
        sample = render(moments[0], self.size, tracks=self.tracks, supersample=self.supersample, generator=seeded("tracks", *which))
        images = sample.images
        for later in moments[1:]:
            images = images + render(later, self.size, supersample=self.supersample).images
        images = images / instants
        if self.noise:
            images = (images + self.noise * torch.randn(images.shape, generator=seeded("noise", *which)).to(self.device)).clamp(0, 1)
        return replace(sample, images=images, name=f"{self.kind}-{self.seed}-{i}")


def stream(scenes: SyntheticScenes, start: int = 0) -> Iterator[Sample]:
    """Sequences `start`, `start` + 1, ... without end. Each worker of a DataLoader yields every num_workers-th sequence."""
    worker = torch.utils.data.get_worker_info()
    step, first = (worker.num_workers, worker.id) if worker else (1, 0)
    for i in itertools.count(start + first, step):
        yield scenes[i]
