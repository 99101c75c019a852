"""Scenes whose points are known, and a headless browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from page4d.data import Frames
from page4d.data.sample import Sample
from page4d.data.synthetic import SyntheticScenes
from page4d.geometry import encode_pose
from page4d.prediction import Prediction
from page4d.viewer import Page, ViewOptions

S, H, W = 5, 56, 84
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"),  # WebGL without a GPU
]


def frames_of(prediction: Prediction) -> Frames:
    images = prediction.images[0]
    count, _, height, width = images.shape
    return Frames(
        images=images,
        names=[f"frame_{i:06d}" for i in range(count)],
        timestamps=[i / 10 for i in range(count)],
        original_sizes=[(height, width)] * count,
        scale=torch.ones(count, 2, dtype=torch.float64),
        offset=torch.zeros(count, 2, dtype=torch.float64),
    )


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The command takes one thread for the rest of its process. Other tests get theirs back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def square() -> tuple[Prediction, Frames]:
    """A green wall at depth 2 before cameras that hardly move. A red square at depth 1.5 moves: 16 x 16 pixels, 10 to the right a frame."""
    images = torch.zeros(1, S, 3, H, W)
    images[:, :, 1] = 0.3 + 0.4 * torch.rand(H, W, generator=torch.Generator().manual_seed(0))
    depth = torch.full((1, S, H, W, 1), 2.0)
    motion = torch.full((1, S, H, W), 0.1)
    for i in range(S):
        part = (0, i, slice(20, 36), slice(4 + 10 * i, 20 + 10 * i))
        depth[part], motion[part] = 1.5, 0.9
        images[0, i, :, 20:36, part[3]] = torch.tensor([1.0, 0.1, 0.1])[:, None, None]
    pose = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 0.8, 1.128]]).repeat(S, 1)  # fov: square pixels
    pose[:, 0] = -0.001 * torch.arange(S)
    prediction = Prediction(images, 0.5 - motion, pose[None], depth=depth, depth_conf=torch.ones(1, S, H, W))
    return prediction, frames_of(prediction)


@pytest.fixture
def tracked(square) -> tuple[Prediction, Frames]:
    """The same with two tracks: the middle of the square, and a point of the wall that the last two frames do not see."""
    prediction, _ = square
    track = torch.tensor([[[12.0 + 10 * i, 28.0], [70.0, 8.0]] for i in range(S)])[None]
    seen = torch.ones(1, S, 2)
    seen[0, 3:, 1] = 0
    prediction = replace(prediction, query_points=track[:, 0], track=track, vis=seen, conf=seen)
    return prediction, frames_of(prediction)


@pytest.fixture
def open_page() -> Iterator:
    """A function like `Page`. All pages are closed at the end."""
    pytest.importorskip("viser", reason="viser is not installed")
    pages: list[Page] = []

    def opened(prediction: Prediction, frames: Frames, options: ViewOptions | None = None) -> Page:
        pages.append(Page(prediction, frames, options or ViewOptions(port=18080)))
        return pages[-1]

    yield opened
    for page in pages:
        page.close()


@pytest.fixture(scope="session")
def rendered() -> tuple[Prediction, Frames]:
    """A rendered room with moving objects. Depth, cameras, motion and tracks are the true ones."""
    sample = SyntheticScenes("dynamic", frames=12, size=(252, 336), seed=0, tracks=64)[7]
    prediction = as_prediction(sample)
    return prediction, frames_of(prediction)


def as_prediction(sample: Sample) -> Prediction:
    """In the axes of the first camera, with a mean depth of 1. Near points are more certain."""
    assert sample.depth is not None and sample.valid is not None and sample.dynamic is not None
    assert sample.tracks is not None and sample.track_visible is not None
    square = torch.cat([sample.extrinsics, torch.tensor([0.0, 0, 0, 1]).expand(len(sample.images), 1, 4)], 1).double()
    extrinsics = (square @ torch.linalg.inv(square[0]))[:, :3].float()
    unit = sample.depth[sample.valid].mean()
    extrinsics[:, :, 3] /= unit
    depth = torch.where(sample.valid, sample.depth / unit, torch.nan)
    return Prediction(
        images=sample.images[None],
        mask=0.45 - 0.9 * sample.dynamic[None].float(),
        pose_enc=encode_pose(extrinsics, sample.intrinsics, (sample.images.shape[-2], sample.images.shape[-1]))[None],
        depth=depth[None, ..., None],
        depth_conf=1 + 1 / depth[None],
        query_points=sample.tracks[None, 0],
        track=sample.tracks[None],
        vis=sample.track_visible[None].float(),
        conf=sample.track_visible[None].float(),
    )


@pytest.fixture
def browser(tmp_path: Path) -> Iterator:
    """A fresh Chromium that draws without a GPU."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = shutil.which("chromium") or shutil.which("chromium-browser") or (own if Path(own).exists() else None)
        if path is None:
            pytest.skip("there is no chromium")
        context = driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=path, args=FLAGS, viewport={"width": 1000, "height": 600}
        )
        yield context
        context.close()
