"""Known cameras: each format read back, matched by name and by time, and refused in words."""

from __future__ import annotations

import json

import pytest
import torch

from page4d.data.frames import Frames
from page4d.errors import InputError
from page4d.export import export
from page4d.long_video.known import Known, matched, read_cameras


@pytest.fixture
def exported(walk, truth, tmp_path):
    count = 6
    prediction = truth(walk, slice(count))
    names, times = [f"frame_{number:06d}" for number in range(count)], [number / 10 for number in range(count)]
    ones = torch.ones(count, 2, dtype=torch.float64)
    frames = Frames(walk.images[:count], names, times, [(56, 84)] * count, ones, 0 * ones)
    export(prediction, frames, tmp_path / "out", ["trajectory", "colmap", "nerfstudio"])
    return tmp_path / "out", names, times


@pytest.mark.parametrize("file", ["", "cameras.json", "trajectory.tum", "colmap", "colmap/sparse/0"])
def test_what_we_write_is_read_back(exported, walk, file):
    out, names, times = exported
    frames, cameras = matched(read_cameras(out / file), names, times)
    assert frames == list(range(6))
    assert (cameras.extrinsics - walk.extrinsics[:6]).abs().max() < 1e-4
    if file == "trajectory.tum":
        assert cameras.intrinsics.isnan().all()
    else:
        assert (cameras.intrinsics[:, :2, :2] - walk.intrinsics[:6, :2, :2]).abs().max() < 1e-2


def test_a_transforms_json_has_a_world_of_its_own(exported):
    out, names, times = exported
    known = read_cameras(out / "nerfstudio" / "transforms.json")
    assert len(known) == 6 and matched(known, names, times)[0] == list(range(6))


def test_times_need_not_be_the_same(walk):
    known = Known(torch.tensor([0.0, 0.11, 0.19, 0.5], dtype=torch.float64), walk.extrinsics[:4].double(), None)
    frames, cameras = matched(known, ["a"] * 4, [0.0, 0.1, 0.2, 0.3])
    assert frames == [0, 1, 2] and torch.equal(cameras.extrinsics, known.extrinsics[:3])


def test_what_cannot_be_read(tmp_path, walk):
    path = tmp_path / "c.json"
    for text, words in (
        ("{", "cannot be read as JSON"),
        ('{"frames": [{"extrinsics": [[1]], "intrinsics": [[1]]}]}', "is damaged"),
        (json.dumps({"frames": [{"name": "a", "extrinsics": [[2.0, 0, 0, 0]] * 3, "intrinsics": [[1.0] * 3] * 3}]}), "not a rotation"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_cameras(path)
    path = tmp_path / "t.txt"
    for text, words in (
        ("1 2 3", "line 1: a TUM trajectory has 8 numbers"),
        ("# only\n", "has no cameras"),
        ("a b", "not a TUM trajectory"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_cameras(path)
    path.write_text("0 0 0 0 0 0 0 0\n")
    with pytest.raises(InputError, match="not a rotation"):
        read_cameras(path)
    with pytest.raises(InputError, match="has no cameras: give"):
        read_cameras(tmp_path / "none")
    known = Known(["x", "y", "z"], walk.extrinsics[:3].double(), None)
    with pytest.raises(InputError, match="0 frames have a known camera, and 3 are needed: their names are such as 'x'"):
        matched(known, ["a", "b"], [0.0, 1.0])
