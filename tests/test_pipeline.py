"""`reconstruct`: the one call behind `page4d infer`, used from Python."""

from __future__ import annotations

import contextlib
import sys
from importlib.util import find_spec

import pytest
import torch

from page4d import preset
from page4d.data import Frames
from page4d.errors import InputError
from page4d.execution.attention_plan import AttentionPlan
from page4d.export import FORMATS, ExportOptions
from page4d.pipeline import reconstruct
from page4d.prediction import Prediction

SMALL = {"weights": "random:tiny", "frames": 2, "size": (28, 42)}


@pytest.fixture(scope="module")
def scene():
    return reconstruct(**SMALL)


def test_three_lines_without_files(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    again = reconstruct(**SMALL)
    assert again.files == [] and not list(tmp_path.iterdir())
    assert isinstance(again.prediction, Prediction) and isinstance(again.frames, Frames)
    assert again.prediction == scene.prediction
    assert capsys.readouterr() == ("", "")  # a notebook that asks for no words gets none
    assert sum(again.attention.values()) > 0 and again.seconds > 0 and "depth head" in again.recording.stages


def test_cameras_are_those_of_the_original_pictures(scene):
    rows, columns = scene.frames.original_sizes[0]
    height, width = scene.prediction.images.shape[-2:]
    corner = torch.tensor([[[0.0, 0.0], [width - 1.0, height - 1.0]]]).expand(2, 2, 2)
    seen = scene.frames.points_to_original(corner)
    ours, network = scene.cameras, scene.prediction.cameras
    rays = torch.cat([corner, torch.ones(2, 2, 1)], -1) @ network.intrinsics[0].inverse().transpose(1, 2)
    again = rays @ ours.intrinsics[0].transpose(1, 2)
    assert torch.allclose(again[..., :2] / again[..., 2:], seen, atol=1e-3)
    assert torch.equal(ours.extrinsics, network.extrinsics) and columns > width and rows > height


def test_files_and_words(scene, tmp_path):
    words: list[str] = []
    found = reconstruct(out=tmp_path / "out", formats=["trajectory", "ply"], say=words.append, **SMALL)
    assert {path.name for path in found.files} == {"points.ply", "trajectory.tum", "cameras.json"}
    assert all(path.is_file() for path in found.files)
    assert any("bundled clip" in line for line in words) and any(line.startswith("memory:") for line in words)
    assert found.prediction.depth is not None and found.prediction.mask is None  # the formats do not need it
    assert torch.equal(found.prediction.depth, scene.prediction.depth)


def test_every_option_of_the_command_line_is_an_argument():
    from page4d.cli.infer import build_parser

    options = {action.dest for action in build_parser()._actions} - {"help", "view"}  # a page is served until Ctrl-C: not in a call
    named = {"input": "inputs", "range": "value_range", "export": "formats"}
    arguments = reconstruct.__kwdefaults__.keys() | {"inputs", "out", "weights"}
    assert {named.get(option, option) for option in options} == arguments - {"say", "progress", "group"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": ["fbx"]}, "unknown format 'fbx'"),
        ({"query_points": [(1e9, 0)]}, "query point 1e+09,0 is outside the first frame"),
        ({"query_points": [(1, 1)], "track_grid": 2}, "exclude each other"),
        ({"track_grid": 0}, "the track grid must be at least 1"),
        ({"profile": True}, "give a folder for it with out"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"inputs": "no_such_file.mp4"}, "no_such_file.mp4"),
    ],
)
def test_mistakes_are_one_line(options, words):
    with pytest.raises(InputError) as error:
        reconstruct(**SMALL | options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_reconstruction_is_not_changed_by_its_use(scene, tmp_path):
    before = {name: value.clone() for name, value in scene.prediction.tensors().items()}
    for name in sorted(FORMATS):
        if FORMATS[name].package and find_spec(FORMATS[name].package) is None:
            continue  # an extra that is not installed here
        with pytest.raises(InputError) if name == "tracks" else contextlib.nullcontext():
            FORMATS[name].write(tmp_path, scene.prediction, scene.frames, ExportOptions())
    assert all(torch.equal(before[name], value) for name, value in scene.prediction.tensors().items())


def test_the_input_s_own_cameras_are_never_replaced(tmp_path):
    """Results in the folder of a model or of a transforms.json would take their place, or that of its depth and points."""
    made = reconstruct(out=tmp_path, formats=["colmap", "nerfstudio"], **SMALL)
    assert made.files
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for inputs, out in (("colmap", ""), ("colmap/sparse/0", ""), ("nerfstudio", ""), ("nerfstudio", "nerfstudio")):
        with pytest.raises(InputError, match=r"beside the input's cameras|among the input's pictures"):
            reconstruct(tmp_path / inputs, tmp_path / out, **SMALL)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = reconstruct(tmp_path / "colmap", tmp_path / "other", formats=["trajectory"], **SMALL)
    assert again.frames.known is not None and again.files


def test_a_package_for_the_usual_formats_is_missed_before_the_work_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(InputError, match="OpenEXR"):
        reconstruct("no_such_file.mp4", tmp_path, depth_type="exr")


def test_default_stands_for_the_usual_formats(tmp_path):
    found = reconstruct(out=tmp_path, formats=["default", "colmap"], **SMALL)
    names = {path.relative_to(tmp_path).parts[0] for path in found.files}
    usual = {"predictions.npz", "points.ply", "depth", "mask", "trajectory.tum", "cameras.json", "overview.png"}
    assert names == usual | {"colmap"}


def test_cameras_of_the_input_are_said(tmp_path):
    reconstruct(out=tmp_path / "a", formats=["colmap"], **SMALL)
    words: list[str] = []
    reconstruct(tmp_path / "a" / "colmap", say=words.append, **SMALL)
    assert any("2 cameras were read with the pictures" in line for line in words)


@pytest.mark.parametrize("check", [64, 0])
def test_a_plan_is_named_in_the_report_with_its_deviation(check):
    from page4d.cli.infer import summary

    found = reconstruct(attention="balanced", attention_check=check, **SMALL)
    assert found.plan.name == "balanced" and not found.plan.exact
    line = next(line for line in summary(found).splitlines() if line.startswith("attention plan balanced"))
    if check:
        start = "attention plan balanced: its layers deviate from exact attention by frame "
        assert line.startswith(start) and line.count("%") == len(found.plan.layers) and line.endswith("%")
        assert f"2x2 {float(found.prediction.attention_deviation[9]):.0%}" in line
    else:
        assert line == "attention plan balanced, its deviation from exact attention was not measured"
    assert not any("plan" in line for line in summary(reconstruct(**SMALL)).splitlines())
    single = summary(reconstruct(attention="balanced", **SMALL | {"frames": 1}))
    assert "attention plan balanced: exact, with a single frame" in single


def test_a_plan_from_a_file(tmp_path):
    depth = preset("tiny").depth
    (tmp_path / "mine.json").write_text(AttentionPlan((("frame",) + ((2, 2),) * (depth - 1)), "mine").to_json())
    assert reconstruct(attention=str(tmp_path / "mine.json"), **SMALL).plan.name == "mine"
    (tmp_path / "short.json").write_text(AttentionPlan(("frame",)).to_json())
    with pytest.raises(InputError, match="the attention plan has 1 layers"):
        reconstruct("no_such_file.mp4", attention=str(tmp_path / "short.json"), weights="random:tiny")
    with pytest.raises(InputError, match=r"cannot read the attention plan '.*none\.json'"):
        reconstruct("no_such_file.mp4", attention=str(tmp_path / "none.json"))
