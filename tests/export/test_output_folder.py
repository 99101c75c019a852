"""Padding is no data, and one run leaves nothing of another in its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from page4d.data.frames import Frames
from page4d.export import export
from page4d.prediction import Prediction

ROWS = slice(8, -8)  # of the frames, inside their padding


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}


def test_padding_is_invalid_everywhere(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    """Depth of 100 and full motion in the padding, less inside: neither is in any file."""
    inside = frames.inside()
    assert prediction.depth is not None and prediction.mask is not None
    wild = replace(
        prediction,
        depth=torch.where(inside[None, ..., None], prediction.depth, 100.0),
        mask=torch.full_like(prediction.mask, -0.5),
    )
    export(wild, frames, tmp_path)
    entries = json.loads((tmp_path / "depth" / "depth.json").read_text())["frames"]
    for name, entry in zip(frames.names, entries, strict=True):
        values = np.asarray(Image.open(tmp_path / "depth" / f"{name}.png"))
        assert not values[:8].any() and not values[-8:].any() and values[ROWS].all() and entry["max"] < 5.1
        preview = np.asarray(Image.open(tmp_path / "depth" / "preview" / f"{name}.png"))
        assert (preview[:8] == 128).all() and (preview[-8:] == 128).all()
        overlay = np.asarray(Image.open(tmp_path / "mask" / f"{name}.png")).astype(int)
        assert overlay[ROWS, :, 0].mean() > 200 > overlay[:8, :, 0].mean()
    loaded = Prediction.load(tmp_path / "predictions.npz")
    assert loaded.valid is not None and loaded.valid.dtype == torch.bool and torch.equal(loaded.valid[0], inside)
    assert loaded.to(torch.float64).valid is not None and loaded.to(torch.float64).valid.dtype == torch.bool


def test_patches_of_padding_alone_have_no_motion(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    padded = replace(frames, original_sizes=[(48, 168)] * 3, offset=torch.tensor([[0, 16]] * 3, dtype=torch.float64))
    assert prediction.mask is not None
    export(replace(prediction, mask=torch.full_like(prediction.mask, -0.5)), padded, tmp_path, ["mask"])
    raw = np.asarray(Image.open(tmp_path / "mask" / "raw" / f"{frames.names[0]}.png"))
    assert (raw[[0, -1]] == 0).all() and (raw[1:-1] == 255).all()


def test_fewer_frames_leave_nothing_of_the_run_before(prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    export(prediction, frames, tmp_path)
    (tmp_path / "mask" / "mine.txt").write_text("of the user")
    one = replace(frames, images=frames.images[:1], names=["other"], timestamps=[0.0], original_sizes=frames.original_sizes[:1],
                  scale=frames.scale[:1], offset=frames.offset[:1])  # fmt: skip
    single = Prediction(**{name: value[:, :1] for name, value in prediction.tensors().items() if name != "query_points"})
    written = export(single, one, tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in written} | {"mask/mine.txt"} == files(tmp_path)


def test_files_that_the_user_changed_stay_and_are_named(
    prediction: Prediction, frames: Frames, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(prediction, frames, tmp_path, ["mask"])
    kept = tmp_path / "mask" / f"{frames.names[0]}.png"
    kept.write_bytes(b"an annotation of the user")
    export(prediction, replace(frames, names=["a", "b", "c"]), tmp_path, ["mask"])
    assert kept.read_bytes() == b"an annotation of the user" and len(files(tmp_path)) == 7
    assert "1 file(s) of an earlier run were changed since and stay" in caplog.text


def test_other_formats_of_an_earlier_run_stay_and_are_named(
    prediction: Prediction, frames: Frames, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(prediction, frames, tmp_path, ["depth", "ply"])
    before = files(tmp_path)
    export(prediction, frames, tmp_path, ["mask"])
    assert before < files(tmp_path) and "still holds depth, ply of an earlier run" in caplog.text


@pytest.mark.parametrize(
    "content",
    ["", "no JSON", "[]", '{"files": 3}', '{"files": {"mask": {"../outside.txt": [1, 2], "/outside.txt": [1, 2], "mask": [1, 2]}}}'],
)
def test_a_manifest_of_another_kind_removes_nothing(content: str, prediction: Prediction, frames: Frames, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "outside.txt").write_text("x")
    (out / "manifest.json").write_text(content)
    export(prediction, frames, out, ["mask"])
    assert (tmp_path / "outside.txt").read_text() == "x" and len(files(out)) == 6


def test_predictions_and_frames_are_equal_by_value(prediction: Prediction, frames: Frames) -> None:
    assert prediction == replace(prediction) and prediction == replace(prediction, images=prediction.images.clone())
    assert prediction != replace(prediction, mask=None) and prediction != replace(prediction, images=prediction.images + 1)
    assert prediction != "a prediction" and prediction.cameras == prediction.cameras
    assert frames == replace(frames) and frames != replace(frames, names=["a", "b", "c"])


def test_files_of_others_are_not_replaced_in_silence(
    prediction: Prediction, frames: Frames, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trajectory.tum").write_text("mine")
    export(prediction, frames, tmp_path, ["trajectory", "mask"])
    assert "1 file(s) that no earlier run left as they were have been replaced, such as trajectory.tum" in caplog.text
    caplog.clear()
    export(prediction, frames, tmp_path, ["trajectory", "mask"])
    assert not caplog.text
    (tmp_path / "mask" / "frame_000000.png").write_bytes(b"edited")
    export(prediction, frames, tmp_path, ["trajectory", "mask"])
    assert "such as mask/frame_000000.png" in caplog.text
