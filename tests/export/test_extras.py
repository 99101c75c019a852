"""Formats that need further packages, and the page that lists all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from page4d.data import InputError
from page4d.data.frames import Frames
from page4d.export import FORMATS, ExportOptions, available, export
from page4d.export.extras import EXTRAS, need
from page4d.pipeline import reconstruct
from page4d.prediction import Prediction

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "package", "extra", "options"),
    [("glb", "trimesh", "export", {}), ("rerun", "rerun", "rerun", {}), ("depth", "OpenEXR", "export", {"depth_type": "exr"})],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    prediction: Prediction,
    frames: Frames,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    package: str,
    extra: str,
    options: dict,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as error:
        export(prediction, frames, tmp_path / "out", ["npz", name], ExportOptions(**options))
    assert f"the package {package!r}, which is not installed: pip install 'page4d[{extra}]'" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert name in available(prediction) or not FORMATS[name].default
    export(prediction, frames, tmp_path / "out", ["npz", "colmap", "nerfstudio", "depth"])  # which need nothing


def test_a_package_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "trimesh.py").write_text("raise ImportError('built for another Python')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trimesh", raising=False)
    with pytest.raises(InputError, match="cannot be imported \\(built for another Python\\)"):
        need("trimesh", "glb files")


def test_formats_are_checked_before_the_model_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(InputError, match=r"page4d\[export\]"):
        reconstruct("no_such_file.mp4", out=tmp_path / "out", formats=["glb"])
    with pytest.raises(InputError, match="glb cannot be 'fbx'"):
        reconstruct("no_such_file.mp4", out=tmp_path / "out", glb="fbx")


def test_every_format_is_documented() -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    for name, entry in FORMATS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |") and "out/" not in line and "MiB" not in line][:1]
        assert ("| default |" in row or name == "tracks") == entry.default, row
        assert not entry.package or f"page4d[{EXTRAS[entry.package]}]" in row, row
