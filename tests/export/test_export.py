from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from page4d.data import InputError
from page4d.data.frames import Frames
from page4d.export import EXPORTERS, NEEDED, available, export
from page4d.export._color import colormap
from page4d.export.depth import write_depth
from page4d.export.mask import write_mask
from page4d.export.overview import write_overview
from page4d.export.ply import write_ply
from page4d.export.tracks import write_tracks
from page4d.export.trajectory import write_trajectory
from page4d.files import AtomicFiles
from page4d.geometry import quaternion_to_matrix
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


@pytest.fixture
def frames(prediction: Prediction) -> Frames:
    """Originals of 168 x 80 pixels, so scaled by a half; 8 rows of padding above and below."""
    return Frames(
        images=prediction.images[0],
        names=[f"frame_{i:06d}" for i in (0, 4, 8)],
        timestamps=[0.0, 0.4, 0.8],
        original_sizes=[(80, 168)] * S,
        scale=torch.full((S, 2), 0.5, dtype=torch.float64),
        offset=torch.tensor([[0, 8]] * S, dtype=torch.float64),
    )


def without(prediction: Prediction, *absent: str) -> Prediction:
    return Prediction(**{name: value for name, value in prediction.tensors().items() if name not in absent})


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_everything_at_once(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    assert available(prediction) == list(EXPORTERS) == list(NEEDED)
    written = export(prediction, frames, out, list(EXPORTERS))
    assert {str(path.relative_to(out)) for path in written} == files_under(out)
    assert files_under(out) == {
        *("predictions.npz", "points.ply", "trajectory.tum", "cameras.json", "tracks.npz", "overview.png", "depth/depth.json"),
        *(f"{kind}/{name}.png" for kind in ("depth", "mask", "tracks") for name in frames.names),
        *(f"depth/{name}_preview.png" for name in frames.names),
    }
    for path in written:
        if path.suffix == ".png":
            Image.open(path).load()
    loaded = Prediction.load(out / "predictions.npz")
    assert all(torch.equal(value, loaded.tensors()[name]) for name, value in prediction.tensors().items())


@pytest.mark.parametrize("source", ["depth", "head"])
def test_ply(prediction: Prediction, frames: Frames, tmp_path: Path, source: str) -> None:
    trimesh = pytest.importorskip("trimesh")
    (path,) = write_ply(tmp_path / "p.ply", prediction, frames, source=source, confidence_percentile=0)
    cloud = trimesh.load(path)
    points, confidence = prediction.points(source)
    inside = frames.inside()
    assert inside.sum() == S * (H - 16) * W
    assert np.array_equal(np.asarray(cloud.vertices, np.float32), points[0][inside].numpy())
    colors = (prediction.images[0].permute(0, 2, 3, 1)[inside] * 255 + 0.5).byte()
    assert np.array_equal(cloud.colors[:, :3], colors.numpy())
    assert np.array_equal(cloud.metadata["_ply_raw"]["vertex"]["data"]["confidence"].reshape(-1), confidence[0][inside].numpy())


def test_ply_keeps_confident_finite_points(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    assert prediction.depth is not None and prediction.depth_conf is not None
    prediction.depth[0, 0, 20, 30] = float("nan")
    prediction.depth_conf[0, 0, 20, 30] = 99
    (path,) = write_ply(tmp_path / "p.ply", prediction, frames, confidence_percentile=75)
    confidence = trimesh.load(path).metadata["_ply_raw"]["vertex"]["data"]["confidence"]
    everything = prediction.depth_conf[0][frames.inside()].numpy()
    everything = everything[everything < 99]
    assert confidence.min() >= np.percentile(everything, 75) and len(confidence) == pytest.approx(len(everything) / 4, abs=1)
    (few,) = write_ply(tmp_path / "few.ply", prediction, frames, max_points=100)
    (again,) = write_ply(tmp_path / "again.ply", prediction, frames, max_points=100)
    assert len(trimesh.load(few).vertices) == 100 and few.read_bytes() == again.read_bytes()


def test_ply_without_points_is_valid(prediction: Prediction, frames: Frames, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert prediction.depth is not None
    prediction.depth.fill_(float("inf"))
    (path,) = write_ply(tmp_path / "p.ply", prediction, frames)
    assert b"element vertex 0\n" in path.read_bytes() and path.read_bytes().endswith(b"end_header\n")
    assert "empty" in caplog.text
    write_overview(tmp_path / "o.png", prediction, frames)


def test_depth(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    assert prediction.depth is not None
    prediction.depth[0, 1, 5, 6:9, 0] = torch.tensor([float("nan"), -1.0, 0.0])
    prediction.depth[0, 2] = float("nan")
    write_depth(tmp_path, prediction, frames)
    meta = json.loads((tmp_path / "depth" / "depth.json").read_text())["frames"]
    assert [entry["name"] for entry in meta] == frames.names
    for entry, depth in zip(meta, prediction.depth[0, ..., 0].numpy(), strict=True):
        image = Image.open(tmp_path / "depth" / entry["file"])
        assert image.mode == "I;16" and image.size == (W, H)
        values = np.asarray(image)
        valid = np.isfinite(depth) & (depth > 0)
        assert np.array_equal(values > 0, valid)
        if valid.any():
            assert np.abs(values[valid] * entry["scale"] - depth[valid]).max() <= 0.51 * entry["scale"]
            assert (entry["min"], entry["max"]) == (depth[valid].min(), depth[valid].max())
    assert meta[2]["max"] == 0


def test_previews_share_one_scale_with_near_warm(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    depth = torch.full((1, S, H, W, 1), 4.0)
    depth[:, :, :, : W // 2] = 2.0
    depth[:, 1, :, W // 2 :] = 2.0
    write_depth(tmp_path, replace(prediction, depth=depth), frames)
    first, second = (np.asarray(Image.open(tmp_path / "depth" / f"{name}_preview.png")).astype(int) for name in frames.names[:2])
    near, far = first[30, 5], first[30, W - 5]
    assert near[0] > near[2] and far[2] > far[0]
    assert (second[30, 5] == near).all() and (second[30, W - 5] == near).all()


def test_mask_is_red_where_things_move(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    mask = torch.full((1, S, H // 14, W // 14), 0.3)
    mask[:, :, :, 4:] = -0.3  # low key bias = moving
    write_mask(tmp_path, replace(prediction, mask=mask, images=torch.full_like(prediction.images, 0.5)), frames)
    picture = np.asarray(Image.open(tmp_path / "mask" / f"{frames.names[0]}.png")).astype(int)
    assert (picture[:30, 75, 0] > 200).all() and (picture[:30, 75, 1] < 80).all()
    assert (np.ptp(picture[:30, 10], axis=-1) < 3).all()


def test_trajectory(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    write_trajectory(tmp_path, prediction, frames)
    rows = np.loadtxt(tmp_path / "trajectory.tum")
    assert rows.shape == (S, 8) and rows[:, 0].tolist() == frames.timestamps
    poses = prediction.cameras.world_from_camera[0]
    assert np.allclose(rows[:, 1:4], poses[..., 3], atol=1e-6)
    assert np.allclose(np.linalg.norm(rows[:, 4:], axis=1), 1)
    assert np.allclose(quaternion_to_matrix(torch.from_numpy(rows[:, 4:])), poses[..., :3], atol=1e-6)
    cameras = json.loads((tmp_path / "cameras.json").read_text())
    assert "camera-from-world" in cameras["convention"]
    for i, entry in enumerate(cameras["frames"]):
        assert (entry["name"], entry["timestamp"], entry["width"], entry["height"]) == (frames.names[i], frames.timestamps[i], 168, 80)
        assert np.allclose(entry["extrinsics"], prediction.cameras.extrinsics[0, i], atol=1e-6)
        k = prediction.cameras.intrinsics[0, i]
        expected: list[list[float]] = [[2 * float(k[0, 0]), 0, 84], [0, 2 * float(k[1, 1]), 40], [0, 0, 1]]
        assert np.allclose(np.array(entry["intrinsics"]), np.array(expected), rtol=1e-5)


def test_infinite_focal_length_is_null(prediction: Prediction, frames: Frames, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert prediction.pose_enc is not None
    prediction.pose_enc[0, 1, 8] = 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    write_trajectory(tmp_path, prediction, frames)
    cameras = json.loads((tmp_path / "cameras.json").read_text(), parse_constant=refuse)["frames"]
    assert cameras[1]["intrinsics"][0][0] is None and math.isfinite(cameras[0]["intrinsics"][0][0])
    assert "field of view" in caplog.text
    export(prediction, frames, tmp_path)


def test_tracks(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    assert prediction.track is not None and prediction.vis is not None and prediction.query_points is not None
    write_tracks(tmp_path, prediction, frames)
    with np.load(tmp_path / "tracks.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["tracks_processed"], prediction.track[0])
        expected = (prediction.track[0] + 0.5 - torch.tensor([0, 8])) * 2 - 0.5
        assert np.allclose(arrays["tracks"], expected, atol=1e-4)
        assert np.allclose(arrays["query_points"], arrays["tracks"][0], atol=1e-4)
        assert np.array_equal(arrays["visibility"], prediction.vis[0])
        assert set(arrays) == {"tracks", "tracks_processed", "query_points", "visibility", "confidence"}


def test_points_are_filled_where_visible(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    track = torch.tensor([[30.0, 28.0]]).expand(1, S, 1, 2)
    vis = torch.tensor([0.9, 0.1, 0.9])[None, :, None]
    black = torch.zeros_like(prediction.images)
    write_tracks(tmp_path, replace(prediction, images=black, track=track, vis=vis, query_points=None, conf=None), frames)
    center = [np.asarray(Image.open(tmp_path / "tracks" / f"{name}.png"))[28, 30].max() for name in frames.names]
    assert center[0] > 200 and center[1] < 50 and center[2] > 200


@pytest.mark.parametrize(
    "absent", [[], ["track"], ["mask"], ["depth"], ["pose_enc"], ["track", "mask", "depth", "pose_enc", "world_points"]]
)
def test_overview_leaves_out_what_is_absent(prediction: Prediction, frames: Frames, tmp_path: Path, absent: list[str]) -> None:
    (full,) = write_overview(tmp_path / "full.png", prediction, frames)
    partial = without(prediction, *absent)
    (path,) = write_overview(tmp_path / "overview.png", partial, frames)
    image, whole = Image.open(path), Image.open(full)
    assert image.width <= whole.width and image.height <= whole.height
    assert "overview" in available(partial)


def test_bfloat16_predictions(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    half = prediction.to(torch.bfloat16)
    assert half.pose_enc is not None
    export(replace(half, pose_enc=half.pose_enc.float()), frames, tmp_path)


@pytest.mark.parametrize("name", [name for name, needed in NEEDED.items() if needed])
def test_missing_outputs_are_named_before_anything_is_written(prediction: Prediction, frames: Frames, tmp_path: Path, name: str) -> None:
    lacking = without(prediction, NEEDED[name][0])
    with pytest.raises(InputError, match=f"cannot export '{name}': this prediction has no .*run the model with") as error:
        export(lacking, frames, tmp_path / "out", ["npz", name])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert name not in available(lacking)


def test_wrong_requests(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown export format 'gif'"):
        export(prediction, frames, tmp_path, ["gif"])
    with pytest.raises(InputError, match="cannot make the folder"):
        (tmp_path / "file").write_text("")
        export(prediction, frames, tmp_path / "file", ["npz"])
    two = Prediction(images=prediction.images.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="one sequence"):
        export(two, frames, tmp_path, ["overview"])
    short = Prediction(images=prediction.images[:, :2])
    with pytest.raises(ValueError, match="2 frames"):
        export(short, frames, tmp_path, ["overview"])


@pytest.mark.parametrize("name", list(EXPORTERS))
def test_nothing_is_left_when_a_writer_fails(
    prediction: Prediction, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk fills up on the last write of the format."""
    (tmp_path / "count").mkdir()
    count = len(export(prediction, frames, tmp_path / "count", [name]))
    out = tmp_path / "out"
    out.mkdir()
    calls = 0

    def limited(write: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            result = write(*args, **kwargs)
            if calls == count:
                raise OSError("No space left on device")
            return result

        return wrapped

    for owner, method in ((Image.Image, "save"), (Path, "write_bytes"), (Path, "write_text"), (np, "savez_compressed")):
        monkeypatch.setattr(owner, method, limited(getattr(owner, method)))
    with pytest.raises(OSError, match="No space"):
        export(prediction, frames, out, [name])
    assert not list(out.rglob("*"))


def test_atomic_files_replace_and_keep(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), AtomicFiles() as files:
        files.add(path).write_text("half")
        files.add(tmp_path / "new" / "b.txt").write_text("half")
        raise RuntimeError
    assert files_under(tmp_path) == {"a.txt"} and path.read_text() == "old" and not (tmp_path / "new").exists()
    with AtomicFiles() as files:
        files.add(path).write_text("new")
        assert path.read_text() == "old"
    assert files.paths == [path] and path.read_text() == "new"


def test_colormap_ends_and_holes() -> None:
    rgb = colormap(np.array([-1.0, 0.0, 1.0, 2.0, np.nan])).astype(int)
    assert (rgb[0] == rgb[1]).all() and (rgb[2] == rgb[3]).all() and (rgb[4] == 128).all()
    assert rgb[1, 2] > rgb[1, 0] and rgb[2, 0] > rgb[2, 2]
