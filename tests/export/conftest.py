"""A prediction and its frames for the exporters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from page4d.data.frames import Frames
from page4d.data.images import Page
from page4d.data.sample import Sample
from page4d.data.synthetic import SyntheticScenes
from page4d.geometry import encode_pose
from page4d.prediction import Prediction

S, H, W, N = 3, 56, 84, 5


@pytest.fixture
def prediction() -> Prediction:
    g = torch.Generator().manual_seed(0)
    pose = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 0.9, 1.1]]).repeat(S, 1)
    pose[:, :7] += 0.1 * torch.randn(S, 7, generator=g) * (torch.arange(S) > 0)[:, None]
    query = torch.rand(1, N, 2, generator=g) * torch.tensor([W, H])
    return Prediction(
        images=torch.rand(1, S, 3, H, W, generator=g),
        mask=torch.rand(1, S, H // 14, W // 14, generator=g) - 0.5,
        pose_enc=pose[None],
        depth=1 + 4 * torch.rand(1, S, H, W, 1, generator=g),
        depth_conf=1 + torch.rand(1, S, H, W, generator=g),
        world_points=torch.randn(1, S, H, W, 3, generator=g),
        world_points_conf=1 + torch.rand(1, S, H, W, generator=g),
        query_points=query,
        track=query[:, None] + 3 * torch.randn(1, S, N, 2, generator=g) * (torch.arange(S) > 0)[:, None, None],
        vis=torch.rand(1, S, N, generator=g),
        conf=torch.rand(1, S, N, generator=g),
    )


@dataclass(frozen=True)
class Rendered:
    """A rendered dynamic scene, as if it had been predicted without an error. The frames are made in memory."""

    truth: Sample
    prediction: Prediction
    frames: Frames


@pytest.fixture(scope="session")
def rendered() -> Rendered:
    truth = SyntheticScenes("dynamic", frames=4, size=(84, 112), seed=0)[3]
    assert truth.depth is not None and truth.dynamic is not None
    moving = torch.nn.functional.adaptive_max_pool2d(truth.dynamic.float(), (6, 8))
    moving = torch.nn.functional.max_pool2d(moving, 3, 1, 1)  # so that bilinear interpolation leaves out no pixel that moves
    prediction = Prediction(
        images=truth.images[None],
        mask=0.45 - 0.9 * moving[None],
        pose_enc=encode_pose(truth.extrinsics.double(), truth.intrinsics.double(), (84, 112))[None],
        depth=truth.depth[None, ..., None],
        depth_conf=1 + truth.depth[None],
    )
    names, sizes = [f"frame {i}" for i in range(4)], [(84, 112)] * 4
    same = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    return Rendered(truth, prediction, Frames(truth.images, names, [0.0, 0.5, 1.0, 1.5], sizes, *same))


@pytest.fixture
def frames(prediction: Prediction, tmp_path_factory: pytest.TempPathFactory) -> Frames:
    """Originals of 168 x 80 pixels, so scaled by a half; 8 rows of padding above and below. One is a JPEG, one a PNG, one a GIF."""
    folder = tmp_path_factory.mktemp("originals")
    pages = [Page(folder / name) for name in ("a.jpg", "b.png", "c.gif")]
    for page, image in zip(pages, prediction.images[0], strict=True):
        pixels = Image.fromarray((image[:, 8:-8].permute(1, 2, 0) * 255).byte().numpy())
        pixels.resize((168, 80)).save(page.path)
    return Frames(
        images=prediction.images[0],
        names=[f"frame_{i:06d}" for i in (0, 4, 8)],
        timestamps=[0.0, 0.4, 0.8],
        original_sizes=[(80, 168)] * S,
        scale=torch.full((S, 2), 0.5, dtype=torch.float64),
        offset=torch.tensor([[0, 8]] * S, dtype=torch.float64),
        pages=pages,
    )
