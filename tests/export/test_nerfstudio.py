"""`transforms.json`, read by the rules that nerfstudio documents."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from page4d.export import ExportOptions, export
from page4d.export.nerfstudio import write_nerfstudio

trimesh = pytest.importorskip("trimesh")

PER_FRAME = {"file_path", "transform_matrix", "w", "h", "fl_x", "fl_y", "cx", "cy", "mask_path", "depth_file_path", "timestamp"}


def read(folder):
    return json.loads((folder / "nerfstudio" / "transforms.json").read_text())


def project(entry: dict, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 2), whose first has its corner at (0, 0), and depths (N,), by nerfstudio's conventions: cameras look along -z, y up."""
    camera = np.linalg.inv(entry["transform_matrix"]) @ np.concatenate([points, np.ones((len(points), 1))], 1).T
    x, y, z = camera[:3]
    return np.stack([entry["fl_x"] * x / -z + entry["cx"], entry["fl_y"] * -y / -z + entry["cy"]], -1), -z


def test_ground_truth_comes_back(rendered, tmp_path):
    write_nerfstudio(tmp_path, rendered.prediction, rendered.frames)
    scene, truth = read(tmp_path), rendered.truth
    assert scene["camera_model"] == "OPENCV" and not any(scene[name] for name in ("k1", "k2", "p1", "p2"))
    turn = np.array(scene["applied_transform"])
    assert np.allclose(turn[:, :3] @ [0, -1, 0], [0, 0, 1]), "what was up is z"
    flip = np.diag([1, -1, -1, 1])
    for i, entry in enumerate(scene["frames"]):
        assert set(entry) == PER_FRAME and (entry["w"], entry["h"]) == (112, 84) and entry["timestamp"] == 0.5 * i
        ours = np.vstack([truth.extrinsics[i].double().numpy(), [0, 0, 0, 1]])
        theirs = np.array(entry["transform_matrix"]) @ flip  # to OpenCV's camera
        assert np.allclose(theirs @ ours, np.vstack([turn, [0, 0, 0, 1]]), atol=1e-5)
        assert np.allclose([entry["fl_x"], entry["fl_y"]], truth.intrinsics[i, [0, 1], [0, 1]], rtol=1e-6)
        assert np.allclose([entry["cx"] - 0.5, entry["cy"] - 0.5], truth.intrinsics[i, :2, 2])
        base = tmp_path / "nerfstudio"
        depth = np.asarray(Image.open(base / entry["depth_file_path"]))
        assert depth.dtype == np.uint16 and np.abs(depth * 0.001 - truth.depth[i].numpy()).max() < 0.00051
        mask = np.asarray(Image.open(base / entry["mask_path"]))
        assert (mask[truth.dynamic[i].numpy()] == 0).all() and (mask == 255).any()
        pixels = np.asarray(Image.open(base / entry["file_path"]))
        assert np.abs(pixels - 255 * truth.images[i].permute(1, 2, 0).numpy()).max() <= 0.51
    cloud = trimesh.load(tmp_path / "nerfstudio" / scene["ply_file_path"])
    pixels, depths = project(scene["frames"][0], np.asarray(cloud.vertices))
    first = np.abs(pixels - 0.5 - np.round(pixels - 0.5)).max(1) < 1e-3  # those of the first frame lie on its pixel centres
    inside = (pixels > 0).all(1) & (pixels < [112, 84]).all(1) & (depths > 0)
    x, y = np.round(pixels[first & inside] - 0.5).astype(int).T
    assert len(x) > 1000
    assert np.mean(np.abs(truth.depth[0].numpy()[y, x] - depths[first & inside]) < 1e-4) > 0.95


def test_sizes_and_crops(prediction, frames, tmp_path):
    """Pictures, masks and depth have the size of the originals, whatever the network saw of them."""
    cropped = replace(frames, offset=frames.offset - 20)  # 12 rows at the top and 20 columns at the left are cut off
    export(prediction, cropped, tmp_path, ["nerfstudio"])
    for entry in read(tmp_path)["frames"]:
        base = tmp_path / "nerfstudio"
        sizes = {Image.open(base / entry[key]).size for key in ("file_path", "mask_path", "depth_file_path")}
        assert sizes == {(168, 80)} == {(entry["w"], entry["h"])}
        depth = np.asarray(Image.open(base / entry["depth_file_path"]))
        assert not depth[:24].any() and not depth[:, :40].any() and depth[24:, 40:].all()


def test_without_a_mask_nothing_is_masked(rendered, tmp_path):
    write_nerfstudio(tmp_path, replace(rendered.prediction, mask=None), rendered.frames)
    assert all("mask_path" not in entry for entry in read(tmp_path)["frames"])
    assert not (tmp_path / "nerfstudio" / "masks").exists()


def test_deep_scenes_have_a_larger_step(rendered, tmp_path, caplog):
    deep = replace(rendered.prediction, depth=rendered.prediction.depth * 10)
    with caplog.at_level(logging.WARNING):
        write_nerfstudio(tmp_path, deep, rendered.frames, ExportOptions())
    assert "give nerfstudio --depth-unit-scale-factor 0.01" in caplog.text and read(tmp_path)["depth_unit_scale_factor"] == 0.01
    entry = read(tmp_path)["frames"][0]
    depth = np.asarray(Image.open(tmp_path / "nerfstudio" / entry["depth_file_path"]))
    assert np.abs(depth * 0.01 - 10 * rendered.truth.depth[0].numpy()).max() < 0.0051


def test_a_few_far_pixels_do_not_cost_the_others_their_depth(rendered, tmp_path, caplog):
    depth = rendered.prediction.depth.clone()
    depth[0, 0, 5, 5] = 7000
    write_nerfstudio(tmp_path, replace(rendered.prediction, depth=depth), rendered.frames)
    assert read(tmp_path)["depth_unit_scale_factor"] == 0.001 and not caplog.text
    stored = np.asarray(Image.open(tmp_path / "nerfstudio" / "depth" / "frame_0.png"))
    assert stored[5, 5] == 0
    stored = np.asarray(Image.open(tmp_path / "nerfstudio" / "depth" / "frame_1.png"))
    assert np.abs(stored * 0.001 - rendered.truth.depth[1].numpy()).max() < 0.00051


def test_stems_that_are_equal_without_blanks_and_suffixes(prediction, frames, tmp_path):
    odd = replace(frames, names=["a b", "a_b", "A b"])
    export(prediction, odd, tmp_path, ["nerfstudio", "colmap"])
    names = [entry["file_path"] for entry in read(tmp_path)["frames"]]
    assert names == ["images/000000_a_b.jpg", "images/000001_a_b.png", "images/000002_A_b.jpg"]
