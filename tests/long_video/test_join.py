"""Chunks of truth, moved to worlds of their own, come together again."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from page4d.evaluation.pose import pose_metrics
from page4d.long_video.chunks import Chunking
from page4d.long_video.join import moved, places
from page4d.long_video.run import run
from page4d.long_video.seams import seam
from page4d.long_video.store import Store


@pytest.mark.parametrize("overlap", [1, 4])
def test_true_chunks_give_the_whole(walk, pieces, truth, random_similarity, tmp_path, overlap):
    chunks = Chunking(12, overlap).divide(40)
    parts = pieces(chunks)
    seams = [seam(a, b, chunk.overlap) for (a, b), chunk in zip(itertools.pairwise(parts), chunks[1:], strict=True)]
    assert all(one.method == "points" and one.error < 1e-4 and 0 < one.static <= 1 for one in seams)
    passes = iter(parts)
    found = run(
        walk.images, chunks, lambda images: (next(passes), images.mean((2, 3))), Store(tmp_path, {}), lambda _, shape: torch.empty(shape)
    )
    whole = found.prediction
    assert all(torch.equal(a, b) for one, two in zip(found.places, places(seams), strict=True) for a, b in zip(one, two, strict=True))
    expected = moved(truth(walk), random_similarity(0))
    assert (whole.depth / expected.depth - 1).abs().max() < 1e-3
    metrics = pose_metrics(whole.cameras.extrinsics[0], walk.extrinsics)
    assert metrics["ate"] < 1e-3 * metrics["ate_constant"] and metrics["rpe_rot"] < 0.05
    assert torch.equal(whole.images[0], walk.images) and torch.equal(whole.mask, truth(walk).mask)
    points, moved_points = whole.points("depth")[0], expected.points("depth")[0]
    assert (points - moved_points).norm(dim=-1).max() < 1e-2 * moved_points.std()


def test_a_prediction_in_another_world(walk, truth, random_similarity):
    original, similarity = truth(walk), random_similarity(3)
    there = moved(original, similarity)
    points = similarity.apply(original.points("depth")[0].double())
    assert (there.points("depth")[0] - points).abs().max() < 1e-3
    back = moved(there, similarity.inverse())
    assert (back.depth - original.depth).abs().max() < 1e-4 and (back.pose_enc - original.pose_enc).abs().max() < 1e-4
    twice = moved(there, random_similarity(4))
    once = moved(original, random_similarity(4).after(similarity))
    assert (twice.depth - once.depth).abs().max() < 1e-3 and (twice.pose_enc - once.pose_enc).abs().max() < 1e-3


def test_without_depth_that_counts_the_cameras_align(pieces, random_similarity):
    first, second = pieces(Chunking(12, 4).divide(20))
    expected = random_similarity(0).after(random_similarity(1).inverse())
    blind = second.depth * float("nan")
    found = seam(first, replace(second, depth=blind), 4)
    assert found.method == "cameras"
    assert float((found.similarity.scale / expected.scale - 1).abs()) < 1e-2
    assert (found.similarity.rotation - expected.rotation).abs().max() < 1e-3
