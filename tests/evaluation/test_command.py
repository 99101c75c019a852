from __future__ import annotations

import json
import sys
import types

import pytest

from page4d.cli.eval import main


@pytest.fixture
def scenes(monkeypatch, scene):
    """Stand-ins for the rendered scenes."""

    class SyntheticScenes:
        def __init__(self, kind, *, frames, size, seed, tracks, moving):
            self.frames, self.size, self.seed = frames, size, seed

        def __getitem__(self, i):
            return scene(frames=self.frames, size=self.size, seed=100 * self.seed + i)

    monkeypatch.setitem(sys.modules, "page4d.data.synthetic", types.SimpleNamespace(SyntheticScenes=SyntheticScenes))


SMALL = ["--weights", "random:tiny", "--device", "cpu", "--size", "28x42", "--frames", "2", "--sequences", "2"]


def test_the_command_prints_a_table_and_writes_json(scenes, tmp_path, capsys):
    out = tmp_path / "new" / "results.json"
    arguments = ["synthetic:static", "synthetic:dynamic", *SMALL, "--tasks", "pose,depth,points,mask", "--align", "scale,median"]
    assert main([*arguments, "--seed", "3", "--mask-strength", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "RANDOM WEIGHTS" in printed.err
    lines = printed.out.splitlines()
    assert len(lines) == 2 + 2 * (2 + 1) and len({line.count("|") for line in lines}) == 1
    assert "pose ATE" in lines[0] and "depth:median AbsRel" in lines[0] and "mask IoU" in lines[0]
    assert lines[2].startswith("| scene-300 |") and lines[4].startswith("| **mean of synthetic:static** |")
    content = json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]
    provenance, results = content["provenance"], content["results"]
    assert provenance["weights"] == "random:tiny" and provenance["seed"] == 3 and provenance["versions"]["torch"]
    assert provenance["protocol"]["size"] == [28, 42] and provenance["protocol"]["mask_strength"] == 2
    assert set(results) == {"synthetic:static", "synthetic:dynamic"}
    sequences = results["synthetic:dynamic"]["sequences"]
    assert [sequence["name"] for sequence in sequences] == ["scene-300", "scene-301"] and sequences[0]["frames"] == 2
    mean = (sequences[0]["metrics"]["pose"]["ate"] + sequences[1]["metrics"]["pose"]["ate"]) / 2
    assert results["synthetic:dynamic"]["mean"]["pose"]["ate"] == pytest.approx(mean)


def test_the_official_protocol_is_recorded_and_undefined_metrics_are_null(scenes, tmp_path):
    out = tmp_path / "results.json"
    single = ["synthetic:static", "--weights", "random:tiny", "--device", "cpu", "--size", "28", "--frames", "1", "--sequences", "1"]
    assert main([*single, "--tasks", "pose,depth", "--official-protocol", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["provenance"]["protocol"]["official"] is True
    assert content["results"]["synthetic:static"]["mean"]["pose"]["rpe_rot"] is None  # one frame has no neighbour


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "unknown data 'nonsense'"),
        (["synthetic:static", "--tasks", "pose,taste"], "unknown task taste"),
        (["synthetic:static", "--align", "best"], "unknown alignment best"),
        (["synthetic:static", "--size", "50"], "size 50 does not work"),
        (["synthetic:static", "--weights", "missing.pt"], "the file does not exist"),
        (["synthetic:static", "--weights", "random:none"], "unknown preset 'none'"),
        (["synthetic:static", "--device", "warp"], "device 'warp' cannot be used"),
        (["synthetic:static", "--tasks", "tracks", *SMALL], "at least 140 x 140"),
    ],
)
def test_mistakes_are_errors_of_one_line(scenes, arguments, message, capsys, tmp_path):
    out = tmp_path / "results.json"
    assert main([*arguments, "--out", str(out)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and message in error[0]
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_made_is_an_error(scenes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["synthetic:static", *SMALL, "--out", str(tmp_path / "file" / "results.json")]) == 2
    assert "cannot write into the folder" in capsys.readouterr().err
