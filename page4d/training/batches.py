"""Batches by step: what step n of rank r trains on depends on the configuration, n and r only, so a resumed run sees what it would have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..data.sample import Sample
from ..data.synthetic import SyntheticScenes, photographs_in, seeded
from .config import DataConfig
from .targets import collate, normalise

MOST_SEQUENCES = 64  # of a batch: numbers of scenes are reserved


class Batches(IterableDataset[Sample]):
    """Normalised batches of micro-steps first, first + 1, ...; each worker makes every so-manieth."""

    def __init__(self, config: DataConfig, first: int, rank: int = 0, ranks: int = 1, tracks: int = 0):
        self.config, self.first, self.rank, self.ranks, self.tracks = config, first, rank, ranks, tracks
        self.photographs = photographs_in(config.photographs) if config.photographs else None

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        skip, step = (worker.id, worker.num_workers) if worker else (0, 1)
        index = self.first + skip
        while True:
            yield self.batch(index)
            index += step

    def batch(self, index: int) -> Sample:
        config = self.config
        least, most = config.frames
        drawn = torch.randint(least, most + 1, (), generator=seeded("frames", config.seed, index))  # the same on every rank: equal work
        frames = int(drawn)
        count = min(config.images // frames, MOST_SEQUENCES)
        scenes = SyntheticScenes(
            config.kind, frames=frames, size=config.size, seed=config.seed, supersample=config.supersample, tracks=self.tracks,
            photographs=self.photographs,
        )  # fmt: skip
        start = (index * self.ranks + self.rank) * MOST_SEQUENCES
        samples = []
        for number in range(start, start + count):
            sample = scenes[number]
            images = jitter(sample.images, config.jitter, seeded("jitter", config.seed, number))
            if config.noise:
                noise = torch.randn(images.shape, generator=seeded("noise", config.seed, number))
                images = (images + config.noise * noise).clamp(0, 1)
            samples.append(replace(sample, images=images))
        return normalise(collate(samples))


def loader(batches: Batches, workers: int) -> Iterator[Sample]:
    """In the order of steps, whatever the number of workers."""
    return iter(DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None))


def jitter(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation (factors 0.5 to 1.5), hue (up to a tenth of the circle), and now and then grey; images (S, 3, H, W).

    One draw for all frames with probability 0.7, else one per frame.
    """
    frames = len(images)
    draws = 1 if float(torch.rand((), generator=generator)) < 0.7 else frames
    u = torch.rand(6, draws, 1, 1, 1, generator=generator).expand(-1, frames, -1, -1, -1)
    brightness, contrast, saturation = (0.5 + u[i] for i in range(3))
    changed = images * brightness
    mean = _grey(changed).mean((-3, -2, -1), keepdim=True)
    changed = (changed - mean) * contrast + mean
    grey = _grey(changed)
    changed = grey + (changed - grey) * saturation
    changed = _turn_hue(changed, (u[3] - 0.5) * 0.2).clamp(0, 1)
    images = torch.where(u[4] < probability, changed, images)
    return torch.where(u[5] < 0.05, _grey(images), images)


def _grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate colours about the grey axis by a share of the circle; turns (S, 1, 1, 1)."""
    axis = F.normalize(images.new_ones(3), dim=0)
    cross = images.new_tensor([[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
    angle = 2 * torch.pi * turns.view(-1, 1, 1)
    rotation = angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) * torch.outer(axis, axis)
    return torch.einsum("sij,sjhw->sihw", rotation, images)
