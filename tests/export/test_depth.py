"""Depth in pixels of the originals, and as EXR."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from page4d.data import InputError
from page4d.export import ExportOptions, _originals, export
from page4d.export._originals import original_depth, original_motion
from page4d.export._percentiles import percentiles
from page4d.geometry import unproject


def test_a_plane_stays_a_plane(prediction, frames):
    """A slanted plane, and the same one seen by the camera of the original: bilinear interpolation is exact but for its curvature."""
    v, u = torch.meshgrid(torch.arange(56.0), torch.arange(84.0), indexing="ij")
    plane = replace(prediction, depth=(3 + 0.01 * u + 0.02 * v)[None, None, ..., None].repeat(1, 3, 1, 1, 1))
    depth = original_depth(plane, frames, 1)
    assert depth.shape == (80, 168) and depth.dtype == np.float32
    y, x = np.mgrid[:80, :168]
    expected = 3 + 0.01 * ((x + 0.5) / 2 - 0.5) + 0.02 * ((y + 0.5) / 2 + 8 - 0.5)
    inner = (slice(1, -1), slice(1, -1))  # beyond the last pixel centres nothing is extrapolated
    assert np.abs(depth - expected)[inner].max() < 1e-5 and (depth > 0).all()


def test_surfaces_are_not_mixed_at_edges(prediction, frames):
    step = torch.where(torch.arange(84) < 40, 1.0, 5.0).expand(1, 3, 56, 84)[..., None]
    depth = original_depth(replace(prediction, depth=step), frames, 0)
    assert set(np.unique(depth)) == {1.0, 5.0} and (depth[:, :80] == 1).all() and (depth[:, 80:] == 5).all()


def test_unknown_is_zero(prediction, frames):
    prediction.depth[0, 0, 30, 40] = float("nan")
    prediction.depth[0, 0, 20, 10] = -1
    depth = original_depth(prediction, frames, 0)
    assert (depth[44:46, 80:82] == 0).all() and (depth[24:26, 20:22] == 0).all() and np.isfinite(depth).all()
    assert (depth == 0).sum() == 8, "their neighbours keep their own depth"
    shifted = replace(frames, offset=frames.offset - torch.tensor([10.0, 28.0]))  # 20 columns and 40 rows are cut off
    depth, motion = original_depth(prediction, shifted, 1), original_motion(prediction, shifted, 1)
    assert (depth[:40] == 0).all() and (depth[:, :20] == 0).all() and depth[40:, 20:].all()
    assert (motion[:40] == 0).all() and (motion[:, :20] == 0).all() and motion[40:, 20:].all()


@pytest.mark.parametrize("kind", ["png", "exr"])
@pytest.mark.parametrize("size", ["network", "original"])
def test_files(prediction, frames, tmp_path, kind, size):
    if kind == "exr":
        exr = pytest.importorskip("OpenEXR")
    export(prediction, frames, tmp_path, ["depth"], ExportOptions(depth_size=size, depth_type=kind))
    for i, entry in enumerate(json.loads((tmp_path / "depth" / "depth.json").read_text())["frames"]):
        file = tmp_path / "depth" / entry["file"]
        stored = exr.File(str(file)).channels()["Z"].pixels if kind == "exr" else np.asarray(Image.open(file)) * entry["scale"]
        expected = original_depth(prediction, frames, i)
        if size == "network":
            expected = np.where(frames.inside()[i].numpy(), prediction.depth[0, i, ..., 0].numpy(), 0)
        assert stored.shape == expected.shape
        assert np.abs(stored - expected).max() <= (0 if kind == "exr" else 0.51 * entry["scale"])
        assert Image.open(tmp_path / "depth" / "preview" / f"{entry['name']}.png").size == (84, 56)


def test_original_depth_lies_on_the_same_points(rendered):
    """A depth map in an original twice as large, unprojected with the original's camera: the same surface."""
    doubled = replace(rendered.frames, scale=torch.full((4, 2), 0.5), original_sizes=[(168, 224)] * 4)
    depth = torch.from_numpy(original_depth(rendered.prediction, doubled, 0)).double()
    cameras = rendered.prediction.cameras
    original = doubled.intrinsics_in_original(cameras.intrinsics[0].double())[0]
    points = unproject(depth, cameras.extrinsics[0, 0].double(), original)
    pixels = points @ cameras.extrinsics[0, 0, :, :3].double().T + cameras.extrinsics[0, 0, :, 3].double()
    pixels = pixels @ cameras.intrinsics[0, 0].double().T
    known = depth > 0
    assert known.float().mean() > 0.5
    x, y = (pixels[..., :2] / pixels[..., 2:])[known].unbind(-1)
    assert torch.allclose(x, ((torch.arange(224) + 0.5) / 2 - 0.5).double().expand(168, -1)[known], atol=1e-4)
    assert torch.allclose(y, ((torch.arange(168) + 0.5) / 2 - 0.5).double()[:, None].expand(-1, 224)[known], atol=1e-4)


def test_options_are_checked():
    for wrong, words in (
        ({"moving": 1.5}, "between 0 and 1, not 1.5"),
        ({"moving": float("nan")}, "between 0 and 1, not nan"),
        ({"moving": "0.5"}, "between 0 and 1, not '0.5'"),
        ({"moving": None}, "between 0 and 1, not None"),
        ({"glb": "fbx"}, "glb cannot be 'fbx': choose from animated, all, static"),
        ({"depth_size": "4k"}, "depth_size cannot be '4k'"),
        ({"depth_type": "tiff"}, "depth_type cannot be 'tiff'"),
    ):
        with pytest.raises(InputError, match=words):
            ExportOptions(**wrong)


@pytest.mark.parametrize("seed", range(20))
def test_percentiles_are_those_of_numpy(seed):
    generator = np.random.default_rng(seed)
    parts = [generator.standard_normal(size).astype(np.float32) for size in generator.integers(0, 400, 5)]
    parts[0] = np.concatenate([parts[0], np.float32([0, -0.0, 1, 1, 1, np.inf, -np.inf][: generator.integers(0, 8)])])
    everything = np.concatenate(parts)
    for percents in ([50], [2, 98], [0, 100], [33.3, 33.4, 66]):
        finite = [part[np.isfinite(part)] for part in parts]
        expected = np.percentile(np.concatenate(finite).astype(np.float64), percents)
        assert np.allclose(percentiles(lambda finite=finite: finite, percents), expected, rtol=1e-12, atol=1e-12)
    assert percentiles(lambda: parts, [0])[0] == everything.min() and percentiles(lambda: parts, [100])[0] == everything.max()


def test_percentiles_of_nothing():
    assert percentiles(lambda: [np.zeros(0, np.float32)], [50]) == [] == percentiles(list, [50])


def test_bands_of_rows_make_the_same_map(prediction, frames, monkeypatch):
    whole = original_depth(prediction, frames, 1), original_motion(prediction, frames, 1)
    monkeypatch.setattr(_originals, "BAND_PIXELS", 7 * 168)
    assert np.array_equal(original_depth(prediction, frames, 1), whole[0])
    assert np.array_equal(original_motion(prediction, frames, 1), whole[1])


def test_motion_reaches_the_rim_of_the_picture(prediction, frames):
    """Padding beside it does not count as static."""
    moving = replace(prediction, mask=torch.full_like(prediction.mask, -0.4))
    assert np.allclose(original_motion(moving, frames, 0), 0.9)
