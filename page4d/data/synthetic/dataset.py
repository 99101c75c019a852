"""Synthetic sequences by number, and a stream of them without end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ...errors import InputError
from ..sample import Sample
from .render import render
from .scene import KINDS, random_scene
from .seeds import seeded
from .texture import photographs_in

SMALLEST = 8  # side of an image, in pixels


class SyntheticScenes(Dataset[Sample]):
    """Sequence i depends on (kind, seed, i) and the options; not on the device, but for rounding.

    Tracks, noise and motion blur leave the scene as it is, photographs all but its textures.

    Args:
        kind: "static", "dynamic" or "mixed".
        frames, size: S, and (H, W) in pixels.
        seed: another seed, other scenes.
        length: how many sequences there are.
        tracks: points followed through each sequence.
        moving: the number of independently moving objects, instead of what the kind says.
        motion_blur: frames are averages of so many instants of the open shutter, half of the time between frames; 1 = none.
        noise: standard deviation of the sensor's noise, as a share of full scale.
        supersample: rays along each side of a pixel.
        photographs: images that serve as textures, besides the procedural ones, or a folder of them.
        device: where to render.
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
            raise InputError("frames, length, motion_blur and supersample have to be at least 1, tracks at least 0")
        if min(size) < SMALLEST:
            raise InputError(f"images of {size[0]} x {size[1]} pixels show nothing: ask for at least {SMALLEST} x {SMALLEST}")
        if not 0 <= noise <= 1:
            raise InputError(f"noise of {noise} is no share of full scale: choose 0 to 1")
        if moving is not None and moving < 0:
            raise InputError(f"the number of moving objects has to be at least 0, not {moving}")
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
        scene = random_scene(
            self.kind, self.frames, seeded("scene", *which), photographs=self.photographs, moving=self.moving, instants=instants
        ).to(self.device)
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
    """Sequences start, start + 1, ... without end; each worker of a DataLoader takes every so-manieth."""
    worker = torch.utils.data.get_worker_info()
    step, first = (worker.num_workers, worker.id) if worker else (1, 0)
    for i in itertools.count(start + first, step):
        yield scenes[i]
