"""Batches depend only on seed and step; colour jitter."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from page4d.data.synthetic import SyntheticScenes
from page4d.training.batches import Batches, jitter, loader
from page4d.training.config import DataConfig


def test_batches_depend_only_on_the_step():
    config = DataConfig(size=(28, 42), frames=(2, 3), images=6)
    alone, later = Batches(config, 0).batch(5), next(loader(Batches(config, 5), 0))
    assert torch.equal(alone.images, later.images) and torch.equal(alone.extrinsics, later.extrinsics)
    config = DataConfig(size=(28, 42), frames=(2, 2), images=4)
    found = [Batches(config, 0, rank, 2).batch(index) for index in (5, 6) for rank in (0, 1)]
    scenes = [depth for batch in found for depth in batch.depth]
    assert not any(torch.equal(a, b) for a, b in combinations(scenes, 2))
    counts = [[len(Batches(DataConfig(size=(14, 14), images=8), 0, rank, 2).batch(i).images[0]) for i in range(4)] for rank in (0, 1)]
    assert counts[0] == counts[1] and len(set(counts[0])) > 1  # equal work


def test_batches_depend_on_the_seed():
    """Another data.seed, however large, gives other numbers of frames, jitter and noise. Noise does not shift other draws."""
    images = torch.full((2, 3, 16, 24), 0.5)

    def fixed(monkeypatch, **options):
        """A batch of grey images, which shows only the batch's own jitter and noise."""
        monkeypatch.setattr(SyntheticScenes, "__getitem__", lambda self, i: replace(truth, images=images))
        return Batches(DataConfig(size=(16, 24), frames=(2, 2), images=2, **options), 0).batch(3).images

    truth = SyntheticScenes("static", frames=2, size=(16, 24), seed=0)[0]
    with pytest.MonkeyPatch.context() as patch:
        for option in ({"noise": 0.1, "jitter": 0.0}, {"noise": 0.0, "jitter": 1.0}):
            found = [fixed(patch, seed=seed, **option) for seed in (1, 2, 1 << 32, (1 << 40) + 1)]
            assert all(not torch.equal(a, b) for a, b in combinations(found, 2))
        noise = fixed(patch, seed=1, noise=0.1, jitter=0.0) - 0.5
        assert float(noise.std()) == pytest.approx(0.1, rel=0.1)
        both = fixed(patch, seed=1, noise=0.01, jitter=1.0) - fixed(patch, seed=1, noise=0.0, jitter=1.0)
        assert torch.allclose(both, 0.1 * noise, atol=1e-5)
    counts = [
        [len(Batches(DataConfig(size=(16, 24), frames=(1, 9), images=9, seed=seed), 0).batch(i).images[0]) for i in range(8)]
        for seed in (1, 2)
    ]
    assert counts[0] != counts[1]


@pytest.mark.slow
def test_workers_keep_the_order():
    config = DataConfig(size=(14, 28), frames=(1, 2), images=2)
    stream = loader(Batches(config, 3), 2)
    for index in range(3, 7):
        assert torch.equal(next(stream).images, Batches(config, 0).batch(index).images)


def test_jitter_with_probability_zero_changes_nothing():
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(jitter(images, 0.0, torch.Generator().manual_seed(1)), images)
    changed = jitter(images, 1.0, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1 and not torch.equal(changed, images)


def test_jitter_by_formula():
    """With the same draws: brightness, contrast about the mean grey, saturation about the grey, hue about the grey axis."""
    grey = torch.tensor([0.299, 0.587, 0.114])
    across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    kinds = set()
    for seed in range(30):
        images = 0.2 + 0.5 * torch.rand(3, 3, 4, 5)
        found = jitter(images, 0.8, torch.Generator().manual_seed(seed))
        g = torch.Generator().manual_seed(seed)
        shared = float(torch.rand((), generator=g)) < 0.7
        draws = torch.rand(6, 1 if shared else 3, generator=g)
        for s in range(3):
            brightness, contrast, saturation, hue, whether, colourless = draws[:, 0 if shared else s].tolist()
            x = images[s].flatten(1)
            if whether < 0.8:
                x = x * (0.5 + brightness)
                mean = (grey @ x).mean()
                x = mean + (x - mean) * (0.5 + contrast)
                x = grey @ x + (x - grey @ x) * (0.5 + saturation)
                x = (torch.matrix_exp(2 * math.pi * 0.2 * (hue - 0.5) * across) @ x).clamp(0, 1)
            if colourless < 0.05:
                x = (grey @ x).expand(3, -1)
            kinds.add((shared, whether < 0.8, colourless < 0.05))
            assert torch.allclose(found[s].flatten(1), x, atol=1e-5)
    assert {kind[0] for kind in kinds} == {kind[1] for kind in kinds} == {kind[2] for kind in kinds} == {True, False}
