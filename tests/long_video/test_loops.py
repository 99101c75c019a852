"""Loops: which frames are compared, and which are believed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from page4d.data.synthetic import SyntheticScenes
from page4d.long_video.chunks import Chunking
from page4d.long_video.join import moved
from page4d.long_video.loops import AROUND, WIDTH, WINDOW, candidates, describe, verify, whitened


def test_a_description_is_of_what_stands_still():
    generator = torch.Generator().manual_seed(0)
    tokens, motion = torch.randn(3, 4 * 6, 16, generator=generator), torch.zeros(3, 4, 6)
    cells = tokens.unflatten(1, (2, 2, 3, 2)).mean((2, 4)).flatten(1, 2)  # (n, 6, C)
    assert torch.allclose(describe(tokens, (4, 6), None), cells.mT.flatten(1), atol=1e-6)
    motion[:, :, 4:] = 1  # somebody stands in the right third of the picture
    changed = tokens.clone().unflatten(1, (4, 6))
    changed[:, :, 4] += 5
    changed[:, :, 5] -= 5
    changed = changed.flatten(1, 2)
    apart = describe(changed, (4, 6), None) - describe(tokens, (4, 6), None)
    changed.unflatten(1, (4, 6))[:, :, 4:] += 9
    still = [describe(x, (4, 6), motion).unflatten(1, (16, 2, 3))[..., :2] for x in (tokens, changed)]
    assert apart.abs().max() < 1e-5 and torch.equal(*still)
    assert describe(torch.randn(2, 6, 200), (2, 3), None).shape == (2, WIDTH)


def test_whitening_forgets_what_all_frames_share():
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(80, 16, generator=generator) * torch.linspace(0.1, 10, 16)
    found, shifted = whitened(own), whitened(own + 30 * torch.randn(1, 16, generator=generator))
    assert torch.allclose(found.norm(dim=1), torch.ones(80)) and found.shape == (80, 10)
    assert torch.allclose((found @ found.mT), shifted @ shifted.mT, atol=1e-3)
    assert not whitened(torch.ones(30, 5)).any(), "of equal frames nothing is left"


def visits(places: list[float], noise: float = 0.3) -> torch.Tensor:
    """Descriptions of frames along a path: near places are alike."""
    centres = torch.linspace(0, 100, 400, dtype=torch.float64)
    at = torch.tensor(places, dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(400, 64, generator=generator, dtype=torch.float64)
    seen = (-((at - centres) ** 2) / 2).exp() @ mix
    return seen + noise * torch.randn(seen.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("speed", [1.0, -1.0, 0.6, 1.6])
def test_a_second_visit_is_found_at_other_speeds_and_on_the_way_back(speed):
    first, between = [0.4 * frame for frame in range(80)], [40 + 0.4 * frame for frame in range(120)]
    again = [8 + 0.4 * speed * frame if speed > 0 else 24 + 0.4 * speed * frame for frame in range(round(40 / abs(speed)))]
    places = first + between + again
    found = candidates(whitened(visits(places)), least_gap=60)
    assert found, speed
    for i, j, _ in found:  # what would be run together shows one place
        seen = [places[max(0, frame - AROUND) : frame + AROUND + 1] for frame in (i, j)]
        assert j - i >= 60 and min(abs(a - b) for a in seen[0] for b in seen[1]) < 1
    assert [value for *_, value in found] == sorted((value for *_, value in found), reverse=True)
    assert all(max(abs(a - x), abs(b - y)) >= WINDOW for n, (a, b, _) in enumerate(found) for x, y, _ in found[:n])
    assert len(candidates(whitened(visits(places)), least_gap=60, most=1)) == 1


def test_without_a_second_visit_there_is_no_candidate():
    places = [0.4 * frame for frame in range(240)]
    assert candidates(whitened(visits(places)), least_gap=60) == []
    assert candidates(whitened(visits(places[:5])), least_gap=60) == [] == candidates(whitened(torch.ones(300, 4)), least_gap=60)


@pytest.fixture(scope="module")
def closed():
    """A walk that closes after 260 frames, without people."""
    return SyntheticScenes("walk", frames=290, size=(28, 42), seed=5)[0]


def test_a_true_loop_is_believed_and_gives_the_true_edge(closed, truth, random_similarity):
    chunks = Chunking(30, 5).divide(290)
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
    chunks = Chunking(30, 5).divide(290)
    pieces = [moved(truth(closed, slice(chunk.start, chunk.end)), random_similarity(k)) for k, chunk in enumerate(chunks)]
    noise = torch.rand(18, 28, 42, 1, generator=torch.Generator().manual_seed(0)) * 2 + 0.2

    def wrong(frames):
        found = truth(closed, list(frames))
        return replace(found, depth=found.depth * noise)

    assert verify((10, 270, 0.9), chunks, pieces.__getitem__, wrong, 0.05) is None
    assert verify((10, 24, 0.9), chunks, pieces.__getitem__, wrong, 0.05) is None, "both are of one chunk"
