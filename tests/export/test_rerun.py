"""The Rerun recording, as Rerun's reader of chunks sees it."""

from __future__ import annotations

import io
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from page4d.export import export
from page4d.export.rerun import write_rerun
from page4d.export.scene import confident_points, scene_cameras

pytest.importorskip("rerun")
chunk = pytest.importorskip("rerun.chunk")


def read(path):
    """Values by entity, component and frame (None if static)."""
    found = defaultdict(dict)
    for part in chunk.RrdReader(path).stream():
        batch = part.to_record_batch()
        columns = {field.name: batch.column(i) for i, field in enumerate(batch.schema)}
        for row in range(batch.num_rows):
            frame = columns["frame"][row].as_py() if "frame" in columns else None
            for name, column in columns.items():
                if ":" in name and column[row].is_valid:
                    found[part.entity_path.strip("/"), name.split(":", 1)[1]][frame] = column[row].as_py()
    return found


def test_everything_comes_back(rendered, tmp_path):
    (path,) = write_rerun(tmp_path, rendered.prediction, rendered.frames)
    found, truth = read(path), rendered.truth
    cameras = scene_cameras(rendered.prediction, rendered.frames)
    assert np.allclose(found["world/path", "strips"][None][0], cameras.world_from_camera[:, :3, 3], atol=1e-6)
    for i, points in enumerate(confident_points(rendered.prediction, rendered.frames, max_points=10**6)):
        still = ~points.moving
        assert np.array_equal(np.array(found[f"world/static/{i:06d}", "positions"][i], np.float32), points.xyz[still])
        packed = np.array(found[f"world/static/{i:06d}", "colors"][i], np.uint32)
        assert np.array_equal(np.stack([packed >> 24, packed >> 16 & 255, packed >> 8 & 255], -1), points.rgb[still])
        moving = np.array(found["world/moving", "positions"][i], np.float32).reshape(-1, 3)
        assert np.array_equal(moving, points.xyz[points.moving])
        assert np.allclose(found["world/camera", "translation"][i][0], cameras.world_from_camera[i, :3, 3], atol=1e-6)
        columns = np.array(found["world/camera", "mat3x3"][i][0]).reshape(3, 3)
        assert np.allclose(columns.T, cameras.world_from_camera[i, :3, :3], atol=1e-6)
        matrix = np.array(found["world/camera", "image_from_camera"][i][0]).reshape(3, 3).T
        assert np.allclose(matrix, truth.intrinsics[i].numpy() + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]), atol=1e-4)
        depth = np.frombuffer(bytes(found["world/camera/depth", "buffer"][i][0]), np.float32).reshape(84, 112)
        assert np.array_equal(depth, truth.depth[i].numpy())
        motion = np.frombuffer(bytes(found["world/camera/motion", "buffer"][i][0]), np.uint8).reshape(84, 112)
        assert (motion[truth.dynamic[i].numpy()] == 1).all() and (motion == 0).any()
        image = Image.open(io.BytesIO(bytes(found["world/camera/image", "blob"][i][0])))
        assert image.size == (112, 84)


def test_tracks_and_times(prediction, frames, tmp_path):
    export(prediction, frames, tmp_path, ["rerun"])
    found = read(tmp_path / "scene.rrd")
    for i in range(3):
        visible = prediction.vis[0, i] >= 0.5
        assert np.allclose(found["world/camera/tracks", "positions"][i], prediction.track[0, i][visible] + 0.5, atol=1e-5)
    times = set()
    for part in chunk.RrdReader(tmp_path / "scene.rrd").stream():
        batch = part.to_record_batch()
        if "time" in batch.schema.names:
            times |= {value.as_py().total_seconds() for value in batch.column("time")}
    assert times == {0.0, 0.4, 0.8}


def test_two_exports_do_not_differ_in_what_they_show(prediction, frames, tmp_path):
    plain = replace(prediction, track=None, mask=None)
    for name in ("a", "b"):
        export(plain, frames, tmp_path / name, ["rerun"])
    first, second = read(tmp_path / "a" / "scene.rrd"), read(tmp_path / "b" / "scene.rrd")
    assert first == second and ("world/camera/motion", "buffer") not in first
