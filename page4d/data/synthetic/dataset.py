"""Synthetic sequences by number, and a stream of them without end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ...errors import InputError
from ..sample import Sample
from .render import render
from .scene import KINDS, random_scene
from .texture import photographs_in


class SyntheticScenes(Dataset[Sample]):
    """Sequence i depends on (kind, seed, i) only, and on the options; not on the device, but for rounding.

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
        photographs: a folder whose images serve as textures, besides the procedural ones.
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
        photographs: str | Path | None = None,
        device: torch.device | str = "cpu",
    ):
        if kind not in KINDS:
            raise InputError(f"unknown kind of scene {kind!r}: choose one of {', '.join(KINDS)}")
        if frames < 1 or min(size) < 1 or length < 1 or motion_blur < 1 or supersample < 1 or noise < 0 or tracks < 0:
            raise InputError("frames, size, length, motion_blur and supersample have to be at least 1, noise and tracks at least 0")
        if moving is not None and moving < 0:
            raise InputError(f"the number of moving objects has to be at least 0, not {moving}")
        self.kind, self.frames, self.size, self.seed, self.length = kind, frames, size, seed, length
        self.tracks, self.moving, self.motion_blur, self.noise, self.supersample = tracks, moving, motion_blur, noise, supersample
        self.photographs = photographs_in(photographs) if photographs else None
        self.device = torch.device(device)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.length:
            raise IndexError(f"sequence {i} of {self.length}")
        digest = hashlib.blake2b(f"{self.kind} {self.seed} {i}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        instants = self.motion_blur
        # with blur, every frame is the first of `instants` moments that fill half of the time to the next frame
        scene = random_scene(
            self.kind, (2 * self.frames - 1) * instants if instants > 1 else self.frames, generator, self.photographs, self.moving
        )
        scene = scene.to(self.device)
        sample = render(scene.frames(slice(None, None, 2 * instants)) if instants > 1 else scene, self.size, tracks=self.tracks,
                        supersample=self.supersample, generator=generator)  # fmt: skip
        images = sample.images
        if instants > 1:
            for moment in range(1, instants):
                later = scene.frames(slice(moment, None, 2 * instants))
                images = images + render(later, self.size, supersample=self.supersample).images
            images = images / instants
        if self.noise:
            images = (images + self.noise * torch.randn(images.shape, generator=generator).to(self.device)).clamp(0, 1)
        return replace(sample, images=images, name=f"{self.kind}-{self.seed}-{i}")


def stream(scenes: SyntheticScenes, start: int = 0) -> Iterator[Sample]:
    """Sequences start, start + 1, ... without end; each worker of a DataLoader takes every so-manieth."""
    worker = torch.utils.data.get_worker_info()
    step, first = (worker.num_workers, worker.id) if worker else (1, 0)
    i = start + first
    while True:
        yield scenes[i]
        i += step
