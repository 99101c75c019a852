"""`load_folder` gives back what was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from page4d.data.frames import Frames
from page4d.errors import InputError
from page4d.export import export
from page4d.export.folder import load_folder
from page4d.prediction import Prediction

FORMATS = ["npz", "trajectory"]


@pytest.fixture
def out(prediction: Prediction, frames: Frames, tmp_path: Path) -> Path:
    export(prediction, frames, tmp_path / "out", FORMATS)
    return tmp_path / "out"


def test_a_folder_gives_back_prediction_and_frames(prediction: Prediction, frames: Frames, out: Path) -> None:
    again, read = load_folder(out)
    assert read == replace(frames, pages=())  # cameras.json does not say where the pictures are
    wanted = replace(prediction, query_points=None, conf=None, valid=frames.inside()[None])
    assert again == wanted
    few, _ = load_folder(out, ("mask",))
    assert few.tensors().keys() == {"images", "depth", "depth_conf", "pose_enc", "mask"} and torch.equal(few.images, again.images)


def test_a_file_alone_keeps_its_padding(frames: Frames, out: Path) -> None:
    _, read = load_folder(out / "predictions.npz")
    assert read.names == ["frame_000000", "frame_000001", "frame_000002"] and read.timestamps == [0.0, 1.0, 2.0]
    assert torch.equal(read.inside(), frames.inside()) and read.original_sizes == [(40, 84)] * 3
    (out / "cameras.json").unlink()
    assert load_folder(out)[1] == read


def test_frames_without_padding_are_their_own_originals(prediction: Prediction, tmp_path: Path) -> None:
    prediction.save(tmp_path / "a.npz")
    _, read = load_folder(tmp_path / "a.npz")
    assert read.original_sizes == [(56, 84)] * 3 and read.inside().all() and not read.offset.any()
    nothing = replace(prediction, valid=torch.zeros(1, 3, 56, 84, dtype=torch.bool))
    nothing.save(tmp_path / "a.npz")
    assert not load_folder(tmp_path / "a.npz")[1].inside().any()


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        load_folder(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_what_is_missing_is_said(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    assert "does not exist: give the output folder of page4d infer" in refused(tmp_path / "nothing")
    assert "give an output folder of page4d infer" in refused(tmp_path)
    for field, words in {"depth": "no depth", "depth_conf": "no depth confidence", "pose_enc": "no cameras", "images": "no images"}.items():
        present = {name: value.numpy() for name, value in prediction.tensors().items() if name != field}
        np.savez(tmp_path / "a.npz", **present)
        assert words in refused(tmp_path / "a.npz") and "a.npz" in refused(tmp_path / "a.npz")


def test_damage_is_said(prediction: Prediction, out: Path) -> None:
    path = out / "predictions.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    for data in (b"", b"PK", whole[:middle], whole[:middle] + bytes(400) + whole[middle + 400 :], b"\x93NUMPY", b"\x80\x04."):
        path.write_bytes(data)
        assert "cannot be read" in refused(out) or "or it is cut off" in refused(out)
    np.save(path.open("wb"), np.zeros(3))
    assert "is not a predictions.npz" in refused(out)
    for wrong in ({"images": prediction.images[0]}, {"depth": prediction.depth[:, :2]}, {"pose_enc": prediction.pose_enc[..., :7]}):
        np.savez(path, **{name: value.numpy() for name, value in (prediction.tensors() | wrong).items()})
        assert "is not a prediction of one sequence" in refused(out) and next(iter(wrong)) in refused(out)


def test_cameras_of_another_run_are_refused(out: Path) -> None:
    path = out / "cameras.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"frames": whole["frames"][:2]}))
    assert "is of another run: it has 2 frames of 56 x 84, and predictions.npz 3 of 56 x 84" in refused(out)
    for entry in whole["frames"]:
        entry["network"]["width"] = 98
    path.write_text(json.dumps(whole))
    assert "3 frames of 56 x 98" in refused(out)
    whole["frames"][1]["network"]["scale"] = [1.0]
    for text in ("", "[]", "{}", '{"frames": 3}', '{"frames": [{}]}', json.dumps(whole), '{"frames": [null]}'):
        path.write_text(text)
        assert "is damaged" in refused(out)
    path.write_bytes(b"\xff\xfe")
    assert "is damaged" in refused(out)
    path.write_text('{"frames": []}')
    assert "it has 0 frames" in refused(out)


def test_what_users_give_instead(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    """A folder inside the output folder, and files of another kind: the line says what to give, and nothing about pickles."""
    export(prediction, frames, tmp_path, ["npz", "colmap", "ply"])
    assert f"give {str(tmp_path)!r}" in refused(tmp_path / "colmap" / "images")
    for file in ("points.ply", "colmap/sparse/0/points3D.bin"):
        assert "is not a predictions.npz, or it is cut off" in refused(tmp_path / file)
