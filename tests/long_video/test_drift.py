"""The method judged without a network: chunks of rendered truth with noise, against the formula of VGGT-Long in its plain form."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from page4d.data.synthetic import SyntheticScenes
from page4d.evaluation.pose import pose_metrics, rotation_angle, trajectory
from page4d.geometry import Similarity, umeyama
from page4d.long_video.chunks import Chunking
from page4d.long_video.join import moved, places
from page4d.long_video.loops import describe
from page4d.long_video.run import run
from page4d.long_video.store import Store

SPAN = 100  # frames
FRAMES = 290  # a walk closes after 260
PASS = 30  # frames of a chunk, the fifth of which are common


def plain(before, after, overlap: int) -> Similarity:
    """VGGT-Long's seam: points of the common frames whose confidence is above a tenth of its median in both, Umeyama in five rounds of
    Huber's weights, delta 0.1, all points alike. Written from its paper (K. Deng et al., VGGT-Long, 2025).
    """
    count = before.images.shape[1]
    parts = [after.frames(slice(0, overlap)), before.frames(slice(count - overlap, None))]
    points = [part.points("depth")[0][0].flatten(0, 2).double() for part in parts]
    conf = [part.depth_conf[0].flatten() for part in parts]
    keep = (conf[0] > 0.1 * conf[0].median()) & (conf[1] > 0.1 * conf[1].median())
    a, b, w = points[0][keep], points[1][keep], (conf[0] * conf[1]).sqrt()[keep].double()
    found = umeyama(a, b, w)
    for _ in range(5):
        length = (found.apply(a) - b).norm(dim=1)
        found = umeyama(a, b, w * torch.where(length > 0.1, 0.1 / length, 1.0))
    return found


class Noisy:
    """A pass: truth in a world of its own, with noise in every depth, a unit that drifts within the pass, and people at a depth that the
    pass made up.
    """

    def __init__(self, sample, truth, random_similarity):
        self.sample, self.truth, self.random_similarity = sample, truth, random_similarity
        self.numbers = {image.numpy().tobytes(): number for number, image in enumerate(sample.images)}

    def __call__(self, images):
        frames = [self.numbers[image.numpy().tobytes()] for image in images]
        generator = torch.Generator().manual_seed(1000 * frames[0] + frames[-1])
        found = moved(self.truth(self.sample, frames), self.random_similarity(frames[0]))
        bent = 1 + 0.02 * torch.linspace(-1, 1, len(frames)).view(1, -1, 1, 1, 1) * torch.randn((), generator=generator)
        rough = 1 + 0.05 * torch.randn(found.depth.shape, generator=generator)
        factor = float((0.3 * torch.randn((), generator=generator)).exp())
        people = torch.where(self.sample.dynamic[frames][None, ..., None], factor, 1.0)
        patches = torch.nn.functional.unfold(images, 7, stride=7).mT  # in place of the encoder's tokens: colours
        described = describe(patches, (images.shape[2] // 7, images.shape[3] // 7), found.motion[0])
        return replace(found, depth=found.depth * bent * rough * people), described


def drift(predicted, true) -> tuple[float, float]:
    """Over all pairs of frames that are 100 apart, after one scale for the whole: mean error of position, as a share of the way between
    them, and mean error of rotation in degrees.
    """
    rotation, centres = trajectory(predicted)
    true_rotation, true_centres = trajectory(true)
    scale = umeyama(centres, true_centres).scale
    way = (true_centres[1:] - true_centres[:-1]).norm(dim=1).cumsum(0)
    step, true_step = (
        (r[:-SPAN].mT @ (c[SPAN:] - c[:-SPAN])[..., None]).squeeze(-1)
        for r, c in ((rotation, scale * centres), (true_rotation, true_centres))
    )
    turn = (true_rotation[:-SPAN].mT @ true_rotation[SPAN:]).mT @ (rotation[:-SPAN].mT @ rotation[SPAN:])
    share = (step - true_step).norm(dim=1) / (way[SPAN - 1 :] - torch.cat([way.new_zeros(1), way])[: len(way) - SPAN + 1])
    return float(share.mean()), float(torch.rad2deg(rotation_angle(turn)).mean())


@pytest.mark.slow
def test_drift_against_the_plain_formula(truth, random_similarity, tmp_path):
    """Four walks with five people before the camera, who cover up to two thirds of a picture."""
    found = {"plain": [], "mask": [], "mask, loops": []}
    closed = 0
    for number in range(4):
        sample = SyntheticScenes("walk", frames=FRAMES, size=(28, 42), seed=70, moving=5)[number]
        chunks, passes = Chunking(PASS, PASS // 5).divide(FRAMES), Noisy(sample, truth, random_similarity)
        options = {"store": Store(tmp_path / str(number), {}), "allocate": lambda _, shape: torch.empty(shape)}
        looped = run(sample.images, chunks, passes, loops=True, **options)
        alone = run(sample.images, chunks, passes, loops=False, **options)
        pieces = [passes(sample.images[chunk.start : chunk.end])[0] for chunk in chunks]
        seams = [plain(a, b, chunk.overlap) for (a, b), chunk in zip(itertools.pairwise(pieces), chunks[1:], strict=True)]
        where = places([replace(seam, similarity=one) for seam, one in zip(alone.seams, seams, strict=True)])
        base = torch.cat([moved(p.frames(c.own), s).cameras.extrinsics[0] for p, c, s in zip(pieces, chunks, where, strict=True)])
        for name, extrinsics in (("plain", base), ("mask", alone.unanchored), ("mask, loops", looped.unanchored)):
            found[name].append((*drift(extrinsics, sample.extrinsics), pose_metrics(extrinsics, sample.extrinsics)["ate"]))
        closed += len(looped.loops)
    mean = {name: torch.tensor(rows).mean(0).tolist() for name, rows in found.items()}
    for name, (share, angle, ate) in mean.items():
        print(f"{name}: {share:.1%} of the way and {angle:.2f} degrees per {SPAN} frames, ATE {ate:.3f} m")
    (plain_share, plain_angle, plain_ate), (share, angle, ate), (_, _, looped_ate) = mean.values()
    assert share < 0.8 * plain_share and angle < plain_angle / 4 and ate < plain_ate  # the rest is the drift within a pass
    assert closed and looped_ate < 0.9 * ate
