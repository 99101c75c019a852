from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from page4d.data import InputError
from page4d.data.frames import Frames
from page4d.data.preprocess import Stack, preprocess
from page4d.export import FORMATS, available, export
from page4d.export.color import colormap
from page4d.export.depth import write_depth
from page4d.export.mask import write_mask
from page4d.export.overview import _top_view, write_overview
from page4d.export.ply import write_ply
from page4d.export.tracks import write_tracks
from page4d.export.trajectory import write_trajectory
from page4d.geometry import encode_pose, quaternion_to_matrix
from page4d.prediction import Prediction

S, H, W, N = 3, 56, 84, 5


def without(prediction: Prediction, *absent: str) -> Prediction:
    return Prediction(**{name: value for name, value in prediction.tensors().items() if name not in absent})


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_formats_are_written_by_default(
    prediction: Prediction, frames: Frames, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    usual = [name for name, entry in FORMATS.items() if entry.default]
    assert available(prediction) == usual
    written = export(prediction, frames, out, progress=True)
    assert capsys.readouterr().err == "", "no progress bar where stderr is not a terminal"
    assert {str(path.relative_to(out)) for path in written} == files_under(out) - {"manifest.json"}
    assert files_under(out) == {
        *("predictions.npz", "points.ply", "trajectory.tum", "cameras.json", "tracks.npz", "overview.png", "depth/depth.json"),
        "manifest.json",
        *(f"{kind}/{name}.png" for kind in ("depth", "mask", "tracks") for name in frames.names),
        *(f"{kind}/{name}.png" for kind in ("depth/preview", "mask/raw") for name in frames.names),
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
    for column, value in enumerate((float("nan"), float("inf"), 0.0, -1.0)):
        prediction.depth[0, 0, 20, column] = value
        prediction.depth_conf[0, 0, 20, column] = 99
    (path,) = write_ply(tmp_path / "p.ply", prediction, frames, confidence_percentile=75)
    confidence = trimesh.load(path).metadata["_ply_raw"]["vertex"]["data"]["confidence"]
    everything = prediction.depth_conf[0][frames.inside()].numpy()
    everything = everything[everything < 99]
    assert (
        confidence.max() < 99
        and confidence.min() >= np.percentile(everything, 75)
        and len(confidence) == pytest.approx(len(everything) / 4, abs=1)
    )
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


def test_depth_pngs_and_their_scales_give_the_depth(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    assert prediction.depth is not None
    prediction.depth[0, 1, 15, 6:9, 0] = torch.tensor([float("nan"), -1.0, 0.0])
    prediction.depth[0, 2] = float("nan")
    write_depth(tmp_path, prediction, frames)
    meta = json.loads((tmp_path / "depth" / "depth.json").read_text())["frames"]
    assert [entry["name"] for entry in meta] == frames.names
    for entry, depth, inside in zip(meta, prediction.depth[0, ..., 0].numpy(), frames.inside().numpy(), strict=True):
        image = Image.open(tmp_path / "depth" / entry["file"])
        assert image.mode == "I;16" and image.size == (W, H)
        values = np.asarray(image)
        valid = np.isfinite(depth) & (depth > 0) & inside
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
    first, second = (np.asarray(Image.open(tmp_path / "depth" / "preview" / f"{name}.png")).astype(int) for name in frames.names[:2])
    near, far = first[30, 5], first[30, W - 5]
    assert near[0] > near[2] and far[2] > far[0]
    assert (second[30, 5] == near).all() and (second[30, W - 5] == near).all()


def test_a_name_that_ends_in_preview_overwrites_nothing(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    named = replace(frames, names=["a", "a_preview", "preview"])
    assert prediction.depth is not None
    written = write_depth(tmp_path, prediction, named)
    assert len(set(written)) == len(written) == 2 * S + 1
    entries = json.loads((tmp_path / "depth" / "depth.json").read_text())["frames"]
    for entry, depth in zip(entries, prediction.depth[0, ..., 0].numpy(), strict=True):
        values = np.asarray(Image.open(tmp_path / "depth" / entry["file"]))[8:-8] * entry["scale"]
        assert np.allclose(values, depth[8:-8], atol=entry["scale"])


def test_mask_is_red_where_things_move(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    mask = torch.full((1, S, H // 14, W // 14), 0.3)
    mask[:, :, :, 4:] = -0.49  # low key bias = moving
    write_mask(tmp_path, replace(prediction, mask=mask, images=torch.full_like(prediction.images, 0.5)), frames)
    picture = np.asarray(Image.open(tmp_path / "mask" / f"{frames.names[0]}.png")).astype(int)
    assert (picture[8:-8, 75, 0] > 200).all() and (picture[8:-8, 75, 1] < 80).all(), "a label that does not fit is left out"
    assert (np.ptp(picture[:8], axis=-1) < 3).all() and (np.ptp(picture[-8:], axis=-1) < 3).all(), "padding does not move"
    assert (np.ptp(picture[:, 10], axis=-1) < 3).all()


def test_mask_colours_do_not_depend_on_the_clip(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    """Noise below 1/2 in a static scene stays clear; just above 1/2 it is faint."""
    images = torch.full_like(prediction.images, 0.5)
    noise = 0.05 * torch.rand(1, S, H // 14, W // 14, generator=torch.Generator().manual_seed(0))
    for mask, reddest in ((noise, 2), (-noise, 30)):
        write_mask(tmp_path, replace(prediction, mask=mask, images=images), frames)
        picture = np.asarray(Image.open(tmp_path / "mask" / f"{frames.names[0]}.png")).astype(int)
        assert np.ptp(picture, axis=-1).max() <= reddest


def test_raw_masks_are_the_motion(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    assert prediction.mask is not None
    write_mask(tmp_path, prediction, frames)
    for name, motion in zip(frames.names, prediction.motion[0], strict=True):
        image = Image.open(tmp_path / "mask" / "raw" / f"{name}.png")
        assert image.mode == "L" and image.size == (W // 14, H // 14)
        assert np.abs(np.asarray(image) - 255 * motion.numpy()).max() <= 0.5 + 1e-3


def test_large_masks_are_labelled(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    images, mask = torch.full((1, S, 3, 252, 336), 0.5), torch.full((1, S, 18, 24), 0.3)
    write_mask(tmp_path, replace(prediction, mask=mask, images=images), replace(frames, images=images[0]))
    picture = np.asarray(Image.open(tmp_path / "mask" / f"{frames.names[0]}.png"))
    assert np.ptp(picture[:200]) == 0 and np.ptp(picture[230:, :150]) > 50


def test_the_trajectory_has_the_poses_of_the_cameras(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
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
        expected: list[list[float]] = [[2 * float(k[0, 0]), 0, 84.5], [0, 2 * float(k[1, 1]), 40.5], [0, 0, 1]]
        assert np.allclose(np.array(entry["intrinsics"]), np.array(expected), rtol=1e-5)
        assert np.allclose(entry["network"].pop("intrinsics"), k, rtol=1e-5)
        assert entry["network"] == {"width": W, "height": H, "scale": [0.5, 0.5], "offset": [0, 8]}


@pytest.mark.parametrize(("mode", "size"), [("crop", 112), ("pad", 112), ("crop", (56, 84)), ("pad", (56, 84))])
def test_cameras_points_and_pixels_agree(mode: str, size: int | tuple[int, int], prediction: Prediction, tmp_path: Path) -> None:
    """A pixel unprojected as in points.ply and projected with cameras.json is where tracks.npz has it."""
    done = [preprocess(Image.new("RGB", (150, 231)), size=size, mode=mode) for _ in range(S)]
    stack = Stack(S)
    for each in done:
        stack.add(each)
    images, scale, offset = stack.result()
    frames = Frames(images, ["a", "b", "c"], [0.0, 1.0, 2.0], [p.original_size for p in done], scale, offset)
    height, width = images.shape[-2:]
    depth = 1 + torch.rand(1, S, height, width, 1, generator=torch.Generator().manual_seed(0))
    case = Prediction(images=images[None], pose_enc=prediction.pose_enc, depth=depth, depth_conf=torch.ones(1, S, height, width))
    assert offset.any(), "something is cut off or padded"
    write_trajectory(tmp_path, case, frames)
    points = case.points()[0][0].double()
    for i, entry in enumerate(json.loads((tmp_path / "cameras.json").read_text())["frames"]):
        pose = torch.tensor(entry["extrinsics"], dtype=torch.float64)
        for x, y in ((0, 0), (width - 1, height - 1), (17, 30)):
            camera = pose[:, :3] @ points[i, y, x] + pose[:, 3]
            here, there = (
                torch.tensor(k, dtype=torch.float64) @ camera / camera[2] for k in (entry["network"]["intrinsics"], entry["intrinsics"])
            )
            pixel = torch.tensor([x, y], dtype=torch.float64)
            torch.testing.assert_close(here[:2], pixel, atol=1e-3, rtol=0)
            expected = frames.points_to_original(pixel.expand(S, 1, 2))[i, 0]
            torch.testing.assert_close(there[:2], expected, atol=1e-3, rtol=0)
            stated = [(pixel[j] + 0.5 - entry["network"]["offset"][j]) / entry["network"]["scale"][j] - 0.5 for j in (0, 1)]
            torch.testing.assert_close(torch.stack(stated), expected)


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


def test_tracks_are_in_pixels_of_the_originals(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
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


def looking(*poses: tuple[float, tuple[float, float, float]]) -> Prediction:
    """Cameras only, from (degrees turned to the right, position x, y, z)."""
    extrinsics = []
    for degrees, center in poses:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        rotation = torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]])  # camera-from-world
        extrinsics.append(torch.cat([rotation, -rotation @ torch.tensor(center, dtype=torch.float32)[:, None]], 1))
    intrinsics = torch.tensor([[60.0, 0, W / 2], [0, 60, H / 2], [0, 0, 1]]).expand(len(poses), 3, 3)
    return Prediction(images=torch.zeros(1, len(poses), 3, H, W), pose_enc=encode_pose(torch.stack(extrinsics), intrinsics, (H, W))[None])


def drawn(prediction: Prediction, frames: Frames) -> list[NDArray[np.float64]]:
    """The positions of one or two cameras in the top view: the mean x, y of the pixels in their colours."""
    picture = np.asarray(_top_view(prediction, frames, 420)).astype(int)
    places = []
    for color in colormap(np.linspace(0, 1, prediction.images.shape[1])):
        y, x = np.nonzero(np.abs(picture - color).sum(-1) < 24)
        places.append(np.array([x.mean(), y.mean()]))
    return places


def test_the_top_view_is_not_mirrored(frames: Frames) -> None:
    first, last = drawn(looking((0, (0, 0, 0)), (0, (1, 0, 2))), frames)
    assert last[0] > first[0] + 50, "a camera to the right is drawn to the right"
    assert last[1] < first[1] - 100, "one further along is drawn higher up"
    # x alone and z alone, in case the axes are swapped
    first, last = drawn(looking((0, (0, 0, 0)), (0, (3, 0, 0.5))), frames)
    assert last[0] > first[0] + 200 and abs(last[1] - first[1]) < 100


def test_the_first_frame_points_up(frames: Frames) -> None:
    (alone,), middle = drawn(looking((90, (5, 1, 2))), frames), 209.5
    assert alone[1] < middle - 3 and abs(alone[0] - middle) < 1, "its view cone opens upwards"
    # Looking along +x from (5, 2): +x is ahead, so up, and -z is to the right.
    first, last = drawn(looking((90, (5, 1, 2)), (0, (7, 1, 1))), frames)
    assert last[0] > first[0] + 50 and last[1] < first[1] - 100


@pytest.mark.parametrize("count", [1, 2])
def test_overview_says_height_and_width(frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    texts: list[str] = []
    write = ImageDraw.ImageDraw.text

    def spied(self, xy, text, *args, **kwargs):
        texts.append(text)
        return write(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spied)
    fewer = replace(
        frames,
        images=frames.images[:count],
        names=frames.names[:count],
        original_sizes=[(80, 168)] * count,
        scale=frames.scale[:count],
        offset=frames.offset[:count],
    )
    mask = torch.zeros(1, count, H // 14, W // 14)
    write_overview(tmp_path / "o.png", Prediction(images=fewer.images[None], mask=mask), fewer)
    assert ("1 frame of 56 x 84" if count == 1 else "2 frames of 56 x 84") in texts
    assert "dynamics mask: motion 0.5 (clear) to 1 (red)" in texts


def test_bfloat16_predictions_can_be_exported(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    half = prediction.to(torch.bfloat16)
    assert half.pose_enc is not None
    export(replace(half, pose_enc=half.pose_enc.float()), frames, tmp_path)


@pytest.mark.parametrize("name", [name for name, entry in FORMATS.items() if entry.needed])
def test_missing_outputs_are_named_before_anything_is_written(prediction: Prediction, frames: Frames, tmp_path: Path, name: str) -> None:
    if FORMATS[name].package:
        pytest.importorskip(FORMATS[name].package)
    lacking = without(prediction, FORMATS[name].needed[0])
    with pytest.raises(InputError, match=f"cannot export '{name}': this prediction has no .*run the model with") as error:
        export(lacking, frames, tmp_path / "out", ["npz", name])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert name not in available(lacking)


def test_unknown_formats_and_wrong_shapes_are_errors(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown format 'gif'"):
        export(prediction, frames, tmp_path, ["gif"])
    two = Prediction(images=prediction.images.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="one sequence"):
        export(two, frames, tmp_path, ["overview"])
    short = Prediction(images=prediction.images[:, :2])
    with pytest.raises(ValueError, match="2 frames"):
        export(short, frames, tmp_path, ["overview"])


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "rerun"])  # whose file is written by its own library
def test_a_failing_writer_leaves_no_files(
    prediction: Prediction, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk is full at the last write of the format."""
    calls, last = 0, math.inf

    def limited(write: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            result = write(*args, **kwargs)
            if calls == last:
                raise OSError(errno.ENOSPC, "No space left on device")
            return result

        return wrapped

    for owner, method in ((Image.Image, "save"), (Path, "write_bytes"), (Path, "write_text"), (np, "savez_compressed")):
        monkeypatch.setattr(owner, method, limited(getattr(owner, method)))
    export(prediction, frames, tmp_path / "count", [name])
    calls, last = 0, calls - 1  # the manifest comes after the files
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=r"cannot write '.*out.*' \(No space left on device\)"):
        export(prediction, frames, out, [name])
    assert not list(out.rglob("*"))


@pytest.mark.parametrize(
    ("name", "file"), [("npz", "predictions.npz"), ("depth", "depth/depth.json"), ("tracks", "tracks/frame_000008.png")]
)
def test_a_folder_in_place_of_a_file_is_an_error(prediction: Prediction, frames: Frames, tmp_path: Path, name: str, file: str) -> None:
    (tmp_path / file).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"cannot write '.*/{file}' \(Is a directory\)") as error:
        export(prediction, frames, tmp_path, [name])
    assert "\n" not in str(error.value) and not files_under(tmp_path)


def test_a_file_in_place_of_a_folder_is_an_error(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    (tmp_path / "depth").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write '.*/depth/.*' \(Not a directory\)"):
        export(prediction, frames, tmp_path, ["depth"])
    assert files_under(tmp_path) == {"depth"}


def test_names_may_be_as_long_as_the_file_system_allows(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    """Temporary names are not longer. Names beyond the limit are an error."""
    longest = [f"{i}" + "n" * 250 for i in range(S)]
    assert len(export(prediction, replace(frames, names=longest), tmp_path / "a", ["mask"])) == 2 * S
    with pytest.raises(InputError, match=r"cannot write '.*nnn\.png' \(File name too long\)"):
        export(prediction, replace(frames, names=[f"{name}n" for name in longest]), tmp_path / "b", ["mask"])
    assert not (tmp_path / "b").exists()


def test_missing_permission_is_an_error(prediction: Prediction, frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, as root ignores permissions. The error names the file, not its temporary name."""

    def refuse(self: Path, text: str, **options: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(InputError, match=r"cannot write '.*/trajectory\.tum' \(Permission denied\)"):
        export(prediction, frames, tmp_path, ["trajectory"])
    assert not list(tmp_path.iterdir())


def test_the_colormap_clips_and_is_grey_for_nan() -> None:
    rgb = colormap(np.array([-1.0, 0.0, 1.0, 2.0, np.nan])).astype(int)
    assert (rgb[0] == rgb[1]).all() and (rgb[2] == rgb[3]).all() and (rgb[4] == 128).all()
    assert rgb[1, 2] > rgb[1, 0] and rgb[2, 0] > rgb[2, 2]
