"""Loops: which frames are compared, and which are believed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from page4d.data.synthetic import SyntheticScenes
from page4d.long_video.chunks import divide
from page4d.long_video.join import moved
from page4d.long_video.loops import candidates, descriptors, verify


def test_descriptors_forget_what_all_frames_share():
    generator = torch.Generator().manual_seed(0)
    own, shared = torch.randn(6, 10, 16, generator=generator), 30 * torch.randn(1, 1, 16, generator=generator)
    found = descriptors(own + shared)
    assert torch.allclose(found.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert torch.allclose(found, descriptors(own), atol=1e-4)
    assert not descriptors(torch.ones(3, 4, 5)).any(), "of equal frames nothing is left"


def ring(places: list[float]) -> torch.Tensor:
    """Descriptors that are similar where the places, on a circle, are near."""
    angle = torch.tensor(places, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], -1)


def test_candidates_are_apart_and_best_first():
    places = [0.1 * frame for frame in range(70)]  # once round after 62.8 frames
    found = candidates(ring(places), least_gap=30, similar=0.9, window=3)
    assert found[0][:2] in ((0, 63), (1, 64), (2, 65), (3, 66), (4, 67), (5, 68), (6, 69)) and found[0][2] > 0.99
    assert all(j - i >= 30 for i, j, _ in found)
    assert [value for *_, value in found] == sorted((value for *_, value in found), reverse=True)
    assert all(max(abs(a - x), abs(b - y)) >= 3 for n, (a, b, _) in enumerate(found) for x, y, _ in found[:n])
    assert len(candidates(ring(places), least_gap=30, similar=0.9, window=1, most=4)) == 4
    assert candidates(ring(places), least_gap=65, similar=1.1) == [] == candidates(ring(places[:3]), least_gap=5)


@pytest.fixture(scope="module")
def closed():
    """A walk that closes after 260 frames, without people."""
    return SyntheticScenes("walk", frames=290, size=(28, 42), seed=5)[0]


def test_a_true_loop_is_believed_and_gives_the_true_edge(closed, truth, random_similarity):
    chunks = divide(290, 30, 5)
    pieces = [moved(truth(closed, slice(chunk.start, chunk.end)), random_similarity(k)) for k, chunk in enumerate(chunks)]
    asked = []

    def predict(frames):
        asked.append(list(frames))
        return moved(truth(closed, list(frames)), random_similarity(99))

    loop = verify((10, 270, 0.9), chunks, pieces.__getitem__, predict, 0.05)
    assert asked == [[*range(6, 15), *range(266, 275)]]
    true = random_similarity(loop.edge.i).after(random_similarity(loop.edge.j).inverse())
    assert (loop.edge.i, loop.edge.j) == (0, 10) and loop.edge.loop and max(one.error for one in loop.seams) < 1e-3
    assert float((loop.edge.similarity.scale / true.scale - 1).abs()) < 1e-2
    assert (loop.edge.similarity.rotation - true.rotation).abs().max() < 1e-2


def test_what_does_not_fit_is_not_believed(closed, truth, random_similarity):
    chunks = divide(290, 30, 5)
    pieces = [moved(truth(closed, slice(chunk.start, chunk.end)), random_similarity(k)) for k, chunk in enumerate(chunks)]
    noise = torch.rand(18, 28, 42, 1, generator=torch.Generator().manual_seed(0)) * 2 + 0.2

    def wrong(frames):
        found = truth(closed, list(frames))
        return replace(found, depth=found.depth * noise)

    assert verify((10, 270, 0.9), chunks, pieces.__getitem__, wrong, 0.05) is None
    assert verify((10, 24, 0.9), chunks, pieces.__getitem__, wrong, 0.05) is None, "both are of one chunk"
