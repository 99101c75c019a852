"""Pictures whose cameras are known: transforms.json in the dialects of nerfstudio, instant-ngp and NeRF, and damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from page4d.data import InputError, load_frames
from page4d.data.posed import read_posed

WIDTH, HEIGHT = 64, 48
POSE = [[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]  # OpenGL axes: the camera looks along -z of the world
EXPECTED = [[0, 1, 0, -2], [1, 0, 0, -1], [0, 0, -1, 3]]  # of POSE in OpenCV's axes, camera-from-world
GLOBAL = {"fl_x": 70.5, "fl_y": 71.5, "cx": 30.25, "cy": 25.5, "w": WIDTH, "h": HEIGHT}


def pictures(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_frames([path], size=28)
    assert "\n" not in str(error.value)
    return str(error.value)


def transforms(folder: Path, frames: list[dict[str, Any]] | None = None, name: str = "transforms.json", **shared: Any) -> Path:
    """A file whose pictures exist. `frames`: None means images/2.png and images/10.png with POSE."""
    names = ["images/10.png", "images/2.png"]
    pictures(folder, names)
    frames = [{"file_path": path, "transform_matrix": POSE} for path in names] if frames is None else frames
    (folder / name).write_text(json.dumps({**shared, "frames": frames}))
    return folder / name


def test_nerfstudio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = transforms(tmp_path, camera_model="OPENCV", k1=0.0, **GLOBAL)
    for given in (path, tmp_path):
        frames = load_frames([given], size=28)
        assert frames.names == ["2", "10"] and frames.known is not None
        assert frames.known.extrinsics[0].tolist() == EXPECTED
        assert frames.known.intrinsics[1].tolist() == [[70.5, 0, 29.75], [0, 71.5, 25], [0, 0, 1]]
    assert not caplog.records
    pictures(tmp_path, ["images/3.png"])
    transforms(tmp_path, k1=0.1, **GLOBAL)
    assert load_frames([path], size=28).known == frames.known
    assert "the lens distortion is left out" in caplog.text and "no camera are left out (1)" in caplog.text


def test_a_point_in_front_lands_where_opengl_says(tmp_path: Path) -> None:
    """2 ahead, 0.5 to the right and 0.25 up of the camera: right of and above the principal point."""
    (posed, _) = read_posed(transforms(tmp_path, **GLOBAL))
    world = np.array(POSE) @ [0.5, 0.25, -2, 1]
    x, y, z = posed.intrinsics @ posed.extrinsics @ world
    assert z == 2 and np.allclose([x / z, y / z], [29.75 + 70.5 / 4, 25 - 71.5 / 8], rtol=0, atol=1e-12)


def test_a_frame_may_have_its_own_camera(tmp_path: Path) -> None:
    frames: list[dict[str, Any]] = [
        {"file_path": "images/2.png", "transform_matrix": POSE, **GLOBAL},
        {"file_path": "images/10.png", "transform_matrix": POSE[:3], "fl_x": 50, "w": float(WIDTH), "h": HEIGHT},
    ]
    first, second = read_posed(transforms(tmp_path, frames))
    assert first.intrinsics[0].tolist() == [70.5, 0, 29.75]
    assert second.intrinsics.tolist() == [[50, 0, 31.5], [0, 50, 23.5], [0, 0, 1]]


def test_angles_and_names_without_suffix(tmp_path: Path) -> None:
    """The synthetic scenes of NeRF: the size of the picture is in the picture. instant-ngp may give both angles."""
    frames = [{"file_path": f"./images/{i}", "transform_matrix": POSE} for i in (10, 2)]
    angle = 2 * np.arctan(0.5)
    found = load_frames([transforms(tmp_path, frames, "transforms_train.json", camera_angle_x=angle)], size=28)
    assert found.names == ["2", "10"] and found.known is not None
    expected = torch.tensor([[WIDTH, 0, WIDTH / 2 - 0.5], [0, WIDTH, HEIGHT / 2 - 0.5], [0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(found.known.intrinsics, expected, rtol=0, atol=1e-9)
    (posed, _) = read_posed(transforms(tmp_path, frames, camera_angle_x=angle, camera_angle_y=2 * np.arctan(0.25)))
    assert np.allclose(posed.intrinsics[1], [0, 2 * HEIGHT, HEIGHT / 2 - 0.5], rtol=0, atol=1e-9)
    (tmp_path / "images/2.png").unlink()
    assert "1 of the 2 pictures that it lists cannot be found, first" in refusal(tmp_path)


SCALED = (2 * np.array(POSE)).tolist()[:3]
MIRRORED = (np.array(POSE) * [-1, 1, 1, 1]).tolist()
HUGE = [[1e300, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transform_matrix": SCALED}, "its pose is scaled or skewed, not a rotation"),
        ({"transform_matrix": HUGE}, "its pose is scaled or skewed, not a rotation"),
        ({"transform_matrix": MIRRORED}, "its pose mirrors the scene"),
        ({"transform_matrix": None}, '"transform_matrix" does not have 4 rows'),
        ({"transform_matrix": [[1, 2]] * 4}, '"transform_matrix" does not have 4 rows'),
        ({"transform_matrix": [*POSE[:3], [0, 0, 1, 1]]}, 'the last row of its "transform_matrix"'),
        ({"transform_matrix": [[float("nan"), 0, 0, 0], *POSE[1:]]}, "nan, which is not a finite number"),
        ({"transform_matrix": [["1", 0, 0, 0], *POSE[1:]]}, "'1', which is not a finite number"),
        ({"file_path": None}, 'it has no "file_path"'),
        ({"file_path": " "}, 'it has no "file_path"'),
        ({"file_path": "."}, "cannot be found"),
        ({"file_path": "a\0b\ud800" + "1" * 5000}, "cannot be found"),
        ({"fl_x": 0}, "are no camera"),
        ({"fl_x": 10**400}, "which is not a finite number"),
        ({"fl_x": True}, "which is not a finite number"),
        ({"w": 64.5}, '"w" is 64.5 and not a number of pixels'),
        ({"h": -1}, '"h" is -1 and not a number of pixels'),
        ({"k1": "x"}, '"k1" holds'),
        ({"camera_model": "OPENCV_FISHEYE"}, "its camera is no pinhole camera ('OPENCV_FISHEYE'): undistort"),
        ({"camera_model": ["OPENCV"]}, "its camera is no pinhole camera"),
        ({"is_fisheye": True}, "its camera is no pinhole camera (is_fisheye)"),
    ],
)
def test_wrong_frames_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    frame = {"file_path": "images/2.png", "transform_matrix": POSE, **changed}
    assert message in refusal(transforms(tmp_path, [frame], **GLOBAL))


@pytest.mark.parametrize("angle", [0, 4, float("inf")])
def test_wrong_angles_are_refused(angle: float, tmp_path: Path) -> None:
    message = refusal(transforms(tmp_path, camera_angle_x=angle))
    assert "not between 0 and pi radians" in message or "not a finite number" in message
    assert 'neither "fl_x" nor "camera_angle_x"' in refusal(transforms(tmp_path, w=WIDTH, h=HEIGHT))


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"{}", b'{"frames": 3}', b'{"frames": [3]}', b"\xff\xfe{", b"[" * 100000])
def test_what_is_no_transforms_json_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "transforms.json").write_bytes(text)
    message = refusal(tmp_path / "transforms.json")
    assert "it is damaged or no JSON" in message or 'it has no list "frames"' in message


def test_transforms_that_list_nothing_or_one_thing_twice(tmp_path: Path) -> None:
    assert "lists no pictures" in refusal(transforms(tmp_path, []))
    frame = {"file_path": "images/2.png", "transform_matrix": POSE, **GLOBAL}
    assert "lists the picture 'images/2.png' 2 times" in refusal(transforms(tmp_path, [frame, frame]))


def test_every_cut_of_a_transforms_json_is_refused(tmp_path: Path) -> None:
    path = transforms(tmp_path, **GLOBAL)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError, match="it is damaged or no JSON"):
            read_posed(path)


def test_what_other_programs_write(tmp_path: Path) -> None:
    """Rounding in the last row, null for what is not known, paths of Windows, suffixes in capitals and left out."""
    pictures(tmp_path, ["images/B.JPG"])
    rounded = [*POSE[:3], [0, 0, 0, 1.0000000000000002]]
    frames = [
        {"file_path": ".\\images\\2.png", "transform_matrix": rounded, "fl_x": None, "k1": None},
        {"file_path": "images/B", "transform_matrix": POSE},
    ]
    found = read_posed(transforms(tmp_path, frames, **GLOBAL))
    assert [posed.image.name for posed in found] == ["2.png", "B.JPG"] and found[0].intrinsics[0, 0] == 70.5
    assert len(load_frames([tmp_path / "transforms.json"], size=28)) == 2


def test_pictures_beside_a_foreign_transforms_json(tmp_path: Path) -> None:
    pictures(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "transforms.json").write_text("{}")
    assert f"to read its pictures without cameras, give {str(tmp_path / '*')!r}" in refusal(tmp_path)
    assert "without cameras" not in refusal(tmp_path / "transforms.json")
