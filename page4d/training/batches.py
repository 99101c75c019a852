"""Batches by step. The batch of step n on rank r depends only on the configuration, n, r and the number of ranks.

So a resumed run trains on the batches that an uninterrupted run would have had.
"""

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

MAX_SEQUENCES = 64  # of one batch: each batch reserves this many scene numbers


class Batches(IterableDataset[Sample]):
    """Normalised batches of micro-steps `first`, `first` + 1, ... Each worker yields every num_workers-th batch.

    A batch is a `Sample` whose tensors have shape (B, S, ...), see `targets.normalise`. `tracks` is the number of points per sequence.
    """

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
        """The batch of micro-step `index` on this rank, with B * S <= `config.images`."""
        config = self.config
        least, most = config.frames
        drawn = torch.randint(least, most + 1, (), generator=seeded("frames", config.seed, index))  # all ranks draw the same: equal work
        frames = int(drawn)
        count = min(config.images // frames, MAX_SEQUENCES)
        scenes = SyntheticScenes(
            config.kind, frames=frames, size=config.size, seed=config.seed, supersample=config.supersample, tracks=self.tracks,
            photographs=self.photographs,
        )  # fmt: skip
        start = (index * self.ranks + self.rank) * MAX_SEQUENCES
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
    """The batches in the order of steps, whatever the number of worker processes."""
    return iter(DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None))


def jitter(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Colour jitter of images (S, 3, H, W) in [0, 1].

    With `probability`: brightness, contrast and saturation by factors from 0.5 to 1.5, and hue by up to a tenth of the circle. With
    probability 0.05 the result is grey. All frames share one draw with probability 0.7, otherwise each frame has its own.
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
    """Rotate the colours of images (S, 3, H, W) about the grey axis by `turns` (S, 1, 1, 1), in fractions of a full circle."""
    axis = F.normalize(images.new_ones(3), dim=0)
    cross = images.new_tensor([[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
    angle = 2 * torch.pi * turns.view(-1, 1, 1)
    rotation = angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) * torch.outer(axis, axis)
    return torch.einsum("sij,sjhw->sihw", rotation, images)
