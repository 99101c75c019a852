from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn import functional as F

from page4d.config import preset
from page4d.data.sample import Sample
from page4d.geometry import encode_pose, unproject
from page4d.prediction import Prediction


def random_poses(frames: int, seed: int, angle: float = 0.3, step: float = 0.4) -> Tensor:
    """Camera-from-world extrinsics (S, 3, 4) float64 of a random walk."""
    generator = torch.Generator().manual_seed(seed)
    turns = (torch.randn(frames, 3, generator=generator, dtype=torch.float64) * angle).cumsum(0)
    centres = (torch.randn(frames, 3, generator=generator, dtype=torch.float64) * step).cumsum(0)
    rotation = torch.from_numpy(Rotation.from_rotvec(turns.numpy()).as_matrix()).mT
    return torch.cat([rotation, -rotation @ centres[..., None]], -1)


def random_sample(frames: int = 3, size: tuple[int, int] = (42, 56), seed: int = 0, tracks: int = 12) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    extrinsics = random_poses(frames, seed, angle=0.1).float()
    intrinsics = torch.tensor([[1.1 * width, 0, width / 2], [0, 1.1 * width, height / 2], [0, 0, 1]]).expand(frames, 3, 3)
    coarse = torch.rand(frames, 1, 4, 5, generator=generator)
    depth = 2 + 4 * F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)[:, 0]
    valid = torch.rand(frames, *size, generator=generator) > 0.1
    dynamic = torch.zeros(frames, *size, dtype=torch.bool)
    dynamic[:, : height // 2, : width // 2] = True
    visible = torch.rand(frames, tracks, generator=generator) > 0.3
    visible[0, : tracks - 2] = True
    visible[0, tracks - 2 :] = False
    return Sample(
        images=torch.rand(frames, 3, *size, generator=generator),
        extrinsics=extrinsics,
        intrinsics=intrinsics,
        depth=depth * valid,
        world_points=unproject(depth, extrinsics, intrinsics) * valid[..., None],
        valid=valid,
        dynamic=dynamic,
        tracks=torch.rand(frames, tracks, 2, generator=generator) * torch.tensor([width - 1.0, height - 1.0]),
        track_visible=visible,
        name=f"scene-{seed}",
    )


class Oracle(nn.Module):
    """A stand-in for the model that returns the ground truth, in another unit and at the size of the images, and records its calls."""

    def __init__(self, samples: list[Sample], unit: float = 0.4, available: frozenset[str] | None = None):
        super().__init__()
        self.samples, self.unit, self.calls = list(samples), unit, []
        self.available = available or {"camera", "depth", "points", "mask", "track"}
        self.dropout = nn.Dropout()
        self.config = preset("page4d")

    def forward(self, images, query_points=None, *, outputs, mask_strength=None, attention=None):
        frames, size = images.shape[1], (images.shape[-2], images.shape[-1])
        self.calls.append({"frames": frames, "size": size, "outputs": set(outputs), "strength": mask_strength, "training": self.training})
        alone = frames == 1
        sample = self.samples[0]
        if alone:
            shown = self.calls[-1]["index"] = sum(call["frames"] == 1 for call in self.calls) - 1
            sample = self._frame(sample, shown % len(sample.images))
        assert len(sample.images) == frames
        found = {}
        original = sample.images.shape[-2:]
        ratio = torch.tensor([[size[1] / original[1]], [size[0] / original[0]], [1]])
        if "camera" in outputs:
            poses = torch.cat([sample.extrinsics[..., :3], sample.extrinsics[..., 3:] * self.unit], -1)
            found["pose_enc"] = encode_pose(poses, sample.intrinsics * ratio, size)[None]
        if "depth" in outputs:
            depth = F.interpolate(sample.depth[:, None], size=size, mode="nearest-exact")[:, 0]
            found["depth"], found["depth_conf"] = self.unit * depth[None, ..., None], torch.ones(1, frames, *size)
        if "points" in outputs:
            points = F.interpolate(sample.world_points.permute(0, 3, 1, 2), size=size, mode="nearest-exact").permute(0, 2, 3, 1)
            found["world_points"], found["world_points_conf"] = self.unit * points[None], torch.ones(1, frames, *size)
        if "mask" in outputs:
            moving = F.interpolate(sample.dynamic[:, None].float(), size=(size[0] // 14, size[1] // 14), mode="area")[:, 0]
            found["mask"] = 0.25 - 0.5 * moving[None]
        if query_points is not None:
            queried = sample.track_visible[0]
            xy = (sample.tracks[:, queried] + 0.5) * ratio[:2, 0] - 0.5
            assert torch.allclose(query_points[0], xy[0], atol=1e-4)
            found["query_points"], found["track"] = query_points, xy[None]
            found["vis"], found["conf"] = sample.track_visible[:, queried].float()[None], torch.ones(1, *xy.shape[:2])
        return Prediction(images=images, **found)

    @staticmethod
    def _frame(sample: Sample, i: int) -> Sample:
        return replace(sample, images=sample.images[i : i + 1], depth=sample.depth[i : i + 1], extrinsics=sample.extrinsics[i : i + 1])


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny, and threads would only add overhead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poses() -> Callable[..., Tensor]:
    return random_poses


@pytest.fixture
def scene() -> Callable[..., Sample]:
    return random_sample


@pytest.fixture
def oracle() -> type[Oracle]:
    return Oracle
