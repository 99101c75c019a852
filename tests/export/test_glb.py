"""The glb, as pygltflib and trimesh read it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from page4d.data import InputError
from page4d.export import ExportOptions, export
from page4d.export.glb import write_glb
from page4d.export.scene import confident_points, scene_cameras

trimesh = pytest.importorskip("trimesh")
pygltflib = pytest.importorskip("pygltflib")

FLIP = np.diag([1.0, -1, -1])
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}  # all numbers are fp32


class Glb:
    def __init__(self, path):
        self.tree = pygltflib.GLTF2().load(str(path))
        self.nodes = {node.name: node for node in self.tree.nodes}

    def values(self, index):
        accessor = self.tree.accessors[index]
        view = self.tree.bufferViews[accessor.bufferView]
        start = (view.byteOffset or 0) + (accessor.byteOffset or 0)
        assert accessor.componentType == pygltflib.FLOAT
        width = WIDTHS[accessor.type]
        values = np.frombuffer(self.tree.binary_blob()[start : start + 4 * accessor.count * width], np.float32).reshape(-1, width)
        assert np.allclose(values.min(0), accessor.min) and np.allclose(values.max(0), accessor.max)
        return values

    def mesh(self, name):
        (primitive,) = self.tree.meshes[self.nodes[name].mesh].primitives
        return primitive, self.values(primitive.attributes.POSITION), self.values(primitive.attributes.COLOR_0)


def written(rendered, folder, glb="animated", **changes):
    (path,) = write_glb(folder, replace(rendered.prediction, **changes), rendered.frames, ExportOptions(glb=glb))
    return Glb(path)


def expected(rendered):
    """Points with y up, and their colours in linear light."""
    parts = list(confident_points(rendered.prediction, rendered.frames, max_points=10**6))
    xyz, rgb, moving = (np.concatenate([getattr(part, name) for part in parts]) for name in ("xyz", "rgb", "moving"))
    srgb = rgb / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return xyz @ FLIP, linear, moving, [part.moving.sum() for part in parts]


@pytest.mark.parametrize("glb", ["static", "all", "animated"])
def test_points_and_colours(rendered, tmp_path, glb):
    scene = written(rendered, tmp_path, glb)
    xyz, rgb, moving, counts = expected(rendered)
    assert 0 < moving.sum() < len(moving)
    primitive, position, color = scene.mesh("static")
    assert primitive.mode == 0 and np.allclose(position, xyz[~moving], atol=1e-6)
    assert np.abs(color - rgb[~moving]).max() < 1e-6
    clouds = [name for name in scene.nodes if name.startswith("moving")]
    if glb == "static":
        assert clouds == []
    elif glb == "all":
        assert np.allclose(scene.mesh("moving")[1], xyz[moving], atol=1e-6)
    else:
        names = [f"moving/{name}" for name, count in zip(rendered.frames.names, counts, strict=True) if count]
        assert clouds == names
        assert np.allclose(np.concatenate([scene.mesh(name)[1] for name in names]), xyz[moving], atol=1e-6)


def test_trimesh_reads_the_whole_scene(rendered, tmp_path):
    written(rendered, tmp_path, "all")
    scene = trimesh.load(tmp_path / "scene.glb")
    xyz, rgb, moving, _ = expected(rendered)
    assert np.abs(scene.geometry["static"].colors[:, :3] / 255 - rgb[~moving]).max() < 0.004
    assert len(scene.geometry["static"].vertices) == (~moving).sum() and len(scene.geometry["moving"].vertices) == moving.sum()
    assert np.allclose(scene.geometry["static"].bounds, [xyz[~moving].min(0), xyz[~moving].max(0)], atol=1e-6)


def test_frusta_path_and_camera(rendered, tmp_path):
    scene = written(rendered, tmp_path, "static")
    poses = scene_cameras(rendered.prediction, rendered.frames).world_from_camera
    primitive, lines, _ = scene.mesh("frusta")
    assert primitive.mode == 1 and len(lines) == 4 * 8 * 2
    for pose, corners in zip(poses, lines.reshape(4, 8, 2, 3), strict=True):
        assert np.allclose(corners[:4, 0], FLIP @ pose[:3, 3], atol=1e-6), "four edges leave the centre"
        camera = (corners[:4, 1] @ FLIP - pose[:3, 3]) @ pose[:3, :3]
        pixels = camera @ rendered.truth.intrinsics[0].double().numpy().T
        assert np.allclose(pixels[:, :2] / pixels[:, 2:], [[-0.5, -0.5], [111.5, -0.5], [111.5, 83.5], [-0.5, 83.5]], atol=1e-3)
    _, path, _ = scene.mesh("path")
    assert np.allclose(path.reshape(3, 2, 3)[:, 1], poses[1:, :3, 3] @ FLIP, atol=1e-6)
    node = scene.nodes["camera"]
    perspective = scene.tree.cameras[node.camera].perspective
    assert perspective.yfov == pytest.approx(2 * np.arctan(42 / float(rendered.truth.intrinsics[0, 1, 1])), rel=1e-6)
    assert perspective.aspectRatio == pytest.approx(112 / 84)
    assert not scene.tree.animations


def rotated(quaternion, vector):
    x, y, z, w = quaternion
    axis = np.array([x, y, z])
    return vector + 2 * np.cross(axis, np.cross(axis, vector) + w * vector)


def test_the_animation_shows_each_moment_alone(rendered, tmp_path):
    scene = written(rendered, tmp_path)
    (animation,) = scene.tree.animations
    camera = next(i for i, node in enumerate(scene.tree.nodes) if node.name == "camera")
    shown = {}
    for channel in animation.channels:
        sampler = animation.samplers[channel.sampler]
        times, values = scene.values(sampler.input)[:, 0], scene.values(sampler.output)
        assert (np.diff(times) > 0).all() and len(times) == len(values)
        if channel.target.node == camera:
            assert sampler.interpolation == "LINEAR" and np.allclose(times, [0, 0.5, 1, 1.5])
            for pose, value in zip(scene_cameras(rendered.prediction, rendered.frames).world_from_camera, values, strict=True):
                if channel.target.path == "translation":
                    assert np.allclose(value, FLIP @ pose[:3, 3], atol=1e-6)
                else:
                    assert np.allclose(rotated(value, np.array([0, 0, -1.0])), FLIP @ pose[:3, 2], atol=1e-6), "it looks along -z"
                    assert np.allclose(rotated(value, np.array([0, 1.0, 0])), FLIP @ -pose[:3, 1], atol=1e-6), "y is up"
            continue
        assert channel.target.path == "scale" and sampler.interpolation == "STEP"
        node = scene.tree.nodes[channel.target.node]
        state = [values[np.searchsorted(times, t, side="right") - 1, 0] for t in (0, 0.2, 0.5, 0.7, 1, 1.2, 1.5)]
        shown[node.name] = state
        assert node.scale == [state[0]] * 3, "programs without animations show the first moment"
    for i, name in enumerate(rendered.frames.names):
        if f"moving/{name}" in shown:
            assert shown[f"moving/{name}"] == [float(i == n) for n in (0, 0, 1, 1, 2, 2, 3)]
    assert len(shown) == sum(name.startswith("moving/") for name in scene.nodes) > 1


def test_a_single_frame_and_a_scene_that_stands_still(rendered, tmp_path):
    still = written(rendered, tmp_path, mask=None)
    assert not any(name.startswith("moving") for name in still.nodes) and len(still.tree.animations) == 1
    one = replace(rendered, prediction=rendered.prediction.frame(0), frames=rendered.frames.frame(0))
    scene = written(one, tmp_path / "one")
    assert not scene.tree.animations and "path" not in scene.nodes and "static" in scene.nodes


def test_frames_without_a_camera(prediction, frames, tmp_path, caplog):
    prediction.pose_enc[0, 0, 7:] = 0
    export(prediction, frames, tmp_path, ["glb"])
    scene = Glb(tmp_path / "scene.glb")
    assert "such as frame_000000" in caplog.text and len(scene.mesh("frusta")[1]) == 2 * 16
    assert "moving/frame_000000" not in scene.nodes
    with pytest.raises(InputError, match="no frame has a finite camera"):
        export(replace(prediction, pose_enc=torch.zeros_like(prediction.pose_enc)), frames, tmp_path / "none", ["glb"])


def test_the_camera_takes_the_short_way(rendered, tmp_path):
    """It turns from 170 to 190 degrees, where the quaternion of each frame alone changes its sign."""
    angles = torch.deg2rad(torch.tensor([170.0, 178.0, 183.0, 190.0])) / 2
    pose = rendered.prediction.pose_enc.clone()
    pose[0, :, 3:7] = torch.stack([torch.zeros(4), angles.sin(), torch.zeros(4), angles.cos()], -1)
    scene = written(rendered, tmp_path, pose_enc=pose)
    (rotations,) = (
        scene.values(scene.tree.animations[0].samplers[channel.sampler].output)
        for channel in scene.tree.animations[0].channels
        if channel.target.path == "rotation"
    )
    assert ((rotations[1:] * rotations[:-1]).sum(1) > 0.9).all()


def test_times_increase_where_pictures_share_one(rendered, tmp_path):
    same = replace(rendered, frames=replace(rendered.frames, timestamps=[0.0, 0.1, 0.1, 0.1]))
    scene = written(same, tmp_path)
    for sampler in scene.tree.animations[0].samplers:
        assert (np.diff(scene.values(sampler.input)[:, 0]) > 0).all()


def test_the_camera_has_both_fields_of_view(rendered, tmp_path):
    pose = rendered.prediction.pose_enc.clone()
    pose[0, :, 7:] = 0.9
    view = written(rendered, tmp_path, pose_enc=pose).tree.cameras[0].perspective
    assert view.yfov == pytest.approx(0.9, abs=1e-6)
    assert 2 * np.arctan(np.tan(view.yfov / 2) * view.aspectRatio) == pytest.approx(0.9, abs=1e-6)
    assert 0 < view.znear < 0.1
