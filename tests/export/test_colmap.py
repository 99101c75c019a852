"""The COLMAP model, as pycolmap reads it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from page4d.data import InputError, load_frames
from page4d.data.frames import Frames
from page4d.data.images import Page
from page4d.export import ExportOptions, export
from page4d.export.colmap import write_colmap
from page4d.export.scene import confident_points, scene_cameras
from page4d.prediction import Prediction

pycolmap = pytest.importorskip("pycolmap")


def model(out: Path, kind: str = "bin"):
    """The model in `out`, read from the binary or from the text files alone."""
    alone = out / f"only {kind}"
    alone.mkdir()
    for file in (out / "colmap" / "sparse" / "0").glob(f"*.{kind}"):
        shutil.copy(file, alone)
    return pycolmap.Reconstruction(str(alone))


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_ground_truth_comes_back(rendered, tmp_path, kind):
    """Cameras to 1e-6, points at the depth of their pixel, and nothing that moves."""
    write_colmap(tmp_path, rendered.prediction, rendered.frames)
    found, truth = model(tmp_path, kind), rendered.truth
    assert found.num_reg_images() == found.num_cameras() == 4 and found.num_points3D() > 5000
    for i, (_, image) in enumerate(sorted(found.images.items())):
        assert image.name == f"frame_{i}.png"
        assert np.abs(image.cam_from_world().matrix() - truth.extrinsics[i].numpy()).max() < 1e-6
        intrinsics = image.camera.calibration_matrix() - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
        assert np.allclose(intrinsics, truth.intrinsics[i].numpy(), rtol=1e-6, atol=1e-6)
        assert (image.camera.model_name, image.camera.width, image.camera.height) == ("PINHOLE", 112, 84)
        assert image.num_points3D == len(image.points2D) > 500
        for point in image.points2D:
            x, y = np.round(point.xy - 0.5).astype(int)
            position = image.cam_from_world() * found.points3D[point.point3D_id].xyz
            assert position[2] == pytest.approx(float(truth.depth[i, y, x]), rel=1e-6)
            assert not truth.dynamic[i, y, x]
            assert (found.points3D[point.point3D_id].color == (truth.images[i, :, y, x] * 255 + 0.5).byte().numpy()).all()


@pytest.mark.parametrize("kind", ["bin", "txt"])
def test_every_point_projects_to_where_it_came_from(prediction, frames, tmp_path, kind):
    """Within 0.01 pixels of the original pictures, which are twice as large as the network's and have no padding."""
    write_colmap(tmp_path, replace(prediction, track=None), frames)
    found, origins = model(tmp_path, kind), scene_cameras(prediction, frames)
    points = list(confident_points(prediction, frames, max_points=500_000, static_only=True))
    for i, (_, image) in enumerate(sorted(found.images.items())):
        assert np.allclose(image.camera.calibration_matrix()[:2, 2], origins.original[i, :2, 2] + 0.5)
        assert len(image.points2D) == len(points[i].xyz) > 100
        assert (image.camera.width, image.camera.height) == (168, 80)
        for point, pixel in zip(image.points2D, points[i].pixels, strict=True):
            place = found.points3D[point.point3D_id]
            assert np.linalg.norm(image.project_point(place.xyz) - point.xy) < 0.01
            assert np.allclose(point.xy, 2 * (pixel + 0.5) - [0, 16], atol=1e-5)
            assert [element.image_id for element in place.track.elements] == [image.image_id]


def test_pictures_and_masks(prediction, frames, tmp_path):
    written = export(prediction, frames, tmp_path, ["colmap"])
    folder = tmp_path / "colmap"
    kinds = {path.name: path.is_symlink() for path in (folder / "images").iterdir()}
    assert kinds == {"frame_000000.jpg": True, "frame_000004.png": True, "frame_000008.jpg": False}
    assert os.path.samefile(folder / "images" / "frame_000000.jpg", frames.pages[0].path)
    for i, name in enumerate(sorted(kinds)):
        original = Image.open(frames.pages[i].path).convert("RGB")
        assert np.abs(np.asarray(Image.open(folder / "images" / name), float) - np.asarray(original, float)).mean() < 4
        mask = np.asarray(Image.open(folder / "masks" / f"{name}.png"))
        assert mask.shape == (80, 168) and set(np.unique(mask)) == {0, 255}
        # a patch of 14 x 14 pixels is 28 x 28 in the original, and 16 rows of the network's frame are padding
        motion = prediction.motion[0, i].numpy()
        centres = mask[26 + 28 * np.arange(2)][:, 14 + 28 * np.arange(6)]
        assert ((centres == 0) == (motion[1:3] > 0.5))[np.abs(motion[1:3] - 0.5) > 0.25].all()
    assert {path.relative_to(tmp_path) for path in written} >= {Path("colmap/masks/frame_000000.jpg.png")}
    again = export(prediction, frames, tmp_path, ["colmap"])
    assert again == written and all(os.path.lexists(path) for path in written), "links are replaced, their targets stay"
    assert all(page.path.is_file() for page in frames.pages)
    export(prediction, frames, tmp_path, ["colmap"], ExportOptions(moving=1.0))
    assert (np.asarray(Image.open(folder / "masks" / "frame_000000.jpg.png")) == 255).all()
    assert os.readlink(folder / "images" / "frame_000000.jpg") == str(frames.pages[0].path.resolve())


def test_points_and_masks_follow_the_threshold(rendered, tmp_path):
    counts = []
    for moving in (0.0, 0.5, 1.0):
        out = tmp_path / str(moving)
        out.mkdir()
        write_colmap(out, rendered.prediction, rendered.frames, ExportOptions(moving=moving))
        counts.append(model(out).num_points3D())
    assert (
        counts[0]
        == 0
        < counts[1]
        < counts[2]
        == sum(len(p.xyz) for p in confident_points(rendered.prediction, rendered.frames, max_points=10**6))
    )


def test_tracks_are_observations(rendered, tmp_path):
    """Tracks that follow points of the static world: they come back where they are, with one observation in each frame that sees them."""
    truth, count = rendered.truth, 40
    static = (~truth.dynamic[0] & truth.valid[0]).nonzero()[:: len(truth.dynamic[0].flatten()) // 60][:count].flip(1)
    world = truth.world_points[0, static[:, 1], static[:, 0]].double()
    camera = torch.einsum("sij,nj->sni", truth.extrinsics[:, :, :3].double(), world) + truth.extrinsics[:, None, :, 3].double()
    pixels = torch.einsum("sij,snj->sni", truth.intrinsics.double(), camera)
    xy = pixels[..., :2] / pixels[..., 2:]
    near = xy.round().long().clamp(min=0)
    x, y = near[..., 0].clamp(max=111), near[..., 1].clamp(max=83)
    depth = torch.stack([truth.depth[i, y[i], x[i]] for i in range(4)])
    seen = ((depth - pixels[..., 2]).abs() < 0.02 * depth) & (near[..., 0] < 112) & (near[..., 1] < 84) & (xy > -0.5).all(-1)
    still = torch.full_like(rendered.prediction.mask, 0.4)
    prediction = replace(rendered.prediction, track=xy[None].float(), vis=seen[None].float(), mask=still)
    write_colmap(tmp_path, prediction, rendered.frames)
    found = model(tmp_path)
    tracks = {number: point for number, point in found.points3D.items() if point.track.length() > 1}
    assert len(tracks) > 10 and max(point.track.length() for point in tracks.values()) == 4
    assert max(tracks) <= count
    for point in tracks.values():
        assert (world.numpy() - point.xyz).__abs__().sum(1).min() < 0.15
        errors = []
        for element in point.track.elements:
            image = found.images[element.image_id]
            observed = image.points2D[element.point2D_idx]
            errors.append(np.linalg.norm(image.project_point(point.xyz) - observed.xy))
            assert seen[element.image_id - 1].any()
        assert np.mean(errors) == pytest.approx(point.error, abs=1e-4) and point.error < 4
    moving = replace(prediction, mask=torch.full_like(prediction.mask, -0.4))
    write_colmap(tmp_path / "moving", moving, rendered.frames)
    assert model(tmp_path / "moving").num_points3D() == 0


def test_a_track_is_where_most_frames_see_it(rendered, tmp_path):
    """The first of four frames sees it 30 % too far away."""
    still = torch.full_like(rendered.prediction.mask, 0.4)
    pose = rendered.prediction.pose_enc[:, :1].repeat(1, 4, 1)
    depth = torch.full_like(rendered.prediction.depth, 2.0)
    depth[:, 0] = 2.6
    track = torch.tensor([30.0, 40.0]).expand(1, 4, 1, 2)
    prediction = replace(rendered.prediction, mask=still, pose_enc=pose, depth=depth, track=track, vis=torch.ones(1, 4, 1))
    write_colmap(tmp_path, prediction, rendered.frames)
    found = model(tmp_path)
    (point,) = (point for point in found.points3D.values() if point.track.length() == 4)
    assert (found.images[1].cam_from_world() * point.xyz)[2] == pytest.approx(2.0, abs=1e-6) and point.error < 1e-4


def test_links_of_an_earlier_run_are_removed_even_if_the_originals_changed(prediction, frames, tmp_path, caplog):
    export(prediction, frames, tmp_path, ["colmap"])
    frames.pages[0].path.touch()
    renamed = replace(frames, names=["x", "y", "z"])
    export(prediction, renamed, tmp_path, ["colmap"])
    assert {path.stem for path in (tmp_path / "colmap" / "images").iterdir()} == {"x", "y", "z"} and not caplog.text
    assert all(page.path.is_file() for page in frames.pages)


def test_frames_without_a_camera_are_left_out(prediction, frames, tmp_path, caplog):
    prediction.pose_enc[0, 1, 7:] = 0
    write_colmap(tmp_path, prediction, frames)
    assert [image.name for _, image in sorted(model(tmp_path).images.items())] == ["frame_000000.jpg", "frame_000008.jpg"]
    assert "colmap: 1 frame(s) without a finite camera are left out, such as frame_000004" in caplog.text
    assert not (tmp_path / "colmap" / "images" / "frame_000004.png").exists()
    prediction.pose_enc[0, :, 7:] = 0
    with pytest.raises(InputError, match="no frame has a finite camera"):
        write_colmap(tmp_path / "none", prediction, frames)
    assert not (tmp_path / "none").exists()


def test_lost_originals_are_an_error_and_nothing_is_written(prediction, frames, tmp_path):
    frames.pages[2].path.unlink()
    with pytest.raises(InputError, match=r"c\.gif"):
        write_colmap(tmp_path / "out", prediction, frames)
    assert not (tmp_path / "out").exists()


def test_originals_that_changed_are_an_error_also_where_they_are_linked(prediction, frames, tmp_path):
    Image.new("RGB", (84, 40)).save(frames.pages[0].path)
    with pytest.raises(InputError, match="'frame_000000' has another size than when it was read"):
        write_colmap(tmp_path / "out", prediction, frames)
    assert not (tmp_path / "out").exists()


def test_links_lead_to_the_files_themselves(prediction, frames, tmp_path):
    """Not to links in the output folder of another run, which may go."""
    export(prediction, frames, tmp_path / "a", ["colmap"])
    link = tmp_path / "a" / "colmap" / "images" / "frame_000000.jpg"
    export(prediction, replace(frames, pages=[Page(link), *frames.pages[1:]]), tmp_path / "b", ["colmap"])
    assert os.readlink(tmp_path / "b" / "colmap" / "images" / "frame_000000.jpg") == str(frames.pages[0].path.resolve())


def test_half_precision_is_as_exact(prediction, frames, tmp_path):
    """Points and cameras come from the same rounded numbers."""
    write_colmap(tmp_path, replace(prediction, track=None).to(torch.bfloat16), frames)
    found = model(tmp_path)
    for image in found.images.values():
        for point in image.points2D:
            assert np.linalg.norm(image.project_point(found.points3D[point.point3D_id].xyz) - point.xy) < 0.01


def test_a_field_of_view_beyond_pi_is_no_camera(prediction, frames, tmp_path, caplog):
    prediction.pose_enc[0, 1, 7:] = 3.3
    write_colmap(tmp_path, prediction, frames)
    assert len(model(tmp_path).images) == 2 and "without a finite camera" in caplog.text


def test_a_track_behind_a_camera_that_sees_it_is_left_out(rendered, tmp_path):
    still = torch.full_like(rendered.prediction.mask, 0.4)
    track = torch.tensor([30.0, 40.0]).expand(1, 4, 1, 2)
    depth = torch.full_like(rendered.prediction.depth, 1e-30)
    pose = rendered.prediction.pose_enc.clone()
    pose[0, :, 3:7] = torch.tensor([0.0, 0, 0, 1])
    pose[0, :, :3] = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 0, -2], [0, 0, -3]])
    prediction = replace(rendered.prediction, mask=still, depth=depth, track=track, vis=torch.ones(1, 4, 1), pose_enc=pose)
    write_colmap(tmp_path, prediction, rendered.frames)
    assert all(point.track.length() == 1 for point in model(tmp_path).points3D.values())


def test_names_of_files(prediction: Prediction, frames: Frames, tmp_path: Path):
    """Blanks end a name in COLMAP's text files."""
    odd = replace(frames, names=["my photo", "my_photo", "\u00fcber"], pages=[frames.pages[0]] * 3)
    write_colmap(tmp_path, prediction, odd)
    for kind in ("bin", "txt"):
        names = [image.name for _, image in sorted(model(tmp_path, kind).images.items())]
        assert names == ["000000_my_photo.jpg", "000001_my_photo.jpg", "000002_\u00fcber.jpg"]
        assert all((tmp_path / "colmap" / "images" / name).is_file() for name in names)


def test_names_that_no_text_holds(prediction, frames, tmp_path):
    """A file name is bytes. Our reader takes what our writer wrote."""
    odd = replace(frames, names=[os.fsdecode(b"\xffz"), "b", "c"])
    export(prediction, odd, tmp_path, ["colmap"])
    again = load_frames([tmp_path / "colmap"], size=(28, 42))
    assert {page.path.stem for page in again.pages} == set(odd.names)


def test_our_own_reader_gives_the_same_cameras(prediction, frames, tmp_path):
    """COLMAP and nerfstudio agree with each other, and both with cameras.json."""
    export(prediction, frames, tmp_path, ["colmap", "nerfstudio", "trajectory"])
    stored = json.loads((tmp_path / "cameras.json").read_text())["frames"]
    for folder in ("colmap", "nerfstudio"):
        again = load_frames([tmp_path / folder], size=(28, 42))
        assert again.known is not None and again.names == frames.names and again.original_sizes == frames.original_sizes
        for i, entry in enumerate(stored):
            extrinsics = again.known.extrinsics[i].numpy()
            if folder == "nerfstudio":  # whose world has z up
                extrinsics = extrinsics @ np.vstack([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
            assert np.allclose(extrinsics, entry["extrinsics"], atol=1e-12)
            assert np.allclose(again.known.intrinsics[i].numpy(), entry["intrinsics"], atol=1e-9)
