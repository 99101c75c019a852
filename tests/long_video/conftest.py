"""Chunks made of rendered truth, each in a world and a unit of its own."""

from __future__ import annotations

import pytest
import torch

from page4d.data.sample import Sample
from page4d.data.synthetic import SyntheticScenes
from page4d.geometry import Similarity, encode_pose, quaternion_to_matrix
from page4d.long_video.join import moved
from page4d.prediction import Prediction


def _random_similarity(seed: int) -> Similarity:
    generator = torch.Generator().manual_seed(seed)
    quaternion = torch.randn(4, generator=generator, dtype=torch.float64)
    scale = torch.rand((), generator=generator, dtype=torch.float64) * 3 + 0.2
    return Similarity(scale, quaternion_to_matrix(quaternion), 5 * torch.randn(3, generator=generator, dtype=torch.float64))


def _truth(sample: Sample, part: slice = slice(None), patch: int = 7) -> Prediction:
    """What a perfect model would predict of some frames, in the world of the sample."""
    size = (sample.images.shape[-2], sample.images.shape[-1])
    pose = encode_pose(sample.extrinsics[part].double(), sample.intrinsics[part].double(), size)
    depth = sample.depth[part]
    moving = torch.nn.functional.avg_pool2d(sample.dynamic[part].float(), patch)
    return Prediction(
        sample.images[part][None],
        mask=(0.5 - moving)[None],
        pose_enc=pose[None],
        depth=depth[None, ..., None],
        depth_conf=torch.ones_like(depth)[None],
    )


@pytest.fixture(scope="session")
def walk() -> Sample:
    """40 frames with a person before the camera."""
    return SyntheticScenes("walk", frames=40, size=(56, 84), seed=11, moving=1)[0]


@pytest.fixture(scope="session")
def random_similarity():
    return _random_similarity


@pytest.fixture(scope="session")
def truth():
    return _truth


@pytest.fixture
def pieces(walk):
    """The true chunks of the walk, chunk i in the world of similarity i."""
    return lambda chunks: [moved(_truth(walk, slice(chunk.start, chunk.end)), _random_similarity(i)) for i, chunk in enumerate(chunks)]
