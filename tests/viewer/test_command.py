"""`page4d view` and `page4d infer --view`: reports, mistakes in one line, and how they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from page4d.cli.main import main
from page4d.export import export
from page4d.pipeline import reconstruct
from page4d.viewer import Page

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--weights", "random:tiny", "--frames", "2", "--size", "28x42"]


@pytest.fixture
def folder(square, tmp_path: Path) -> Path:
    export(*square, tmp_path / "out", ["npz", "trajectory"])
    return tmp_path / "out"


@pytest.fixture
def no_viser(monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)


@pytest.fixture
def interrupted(monkeypatch) -> list[Page]:
    """Ctrl-C as soon as a page is served. Returns the pages."""
    pytest.importorskip("viser", reason="viser is not installed")
    pages: list[Page] = []

    def stop(page: Page) -> None:
        pages.append(page)
        raise KeyboardInterrupt

    monkeypatch.setattr(Page, "follow", stop)
    return pages


def error_line(capsys) -> str:
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert not printed.out
    return line


def test_the_page_is_served_until_ctrl_c(folder, interrupted, capsys, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("page4d.viewer.page.has_browser", lambda: True)
    assert main(["view", str(folder), "--port", "18090", "--moving", "0.7", "--confidence", "20", "--fps", "5"]) == 0
    (page,) = interrupted
    printed = capsys.readouterr()
    assert printed.out == f"the scene is at {page.address} (Ctrl-C ends it)\n" and opened == [page.address] and not printed.err
    state = page.controls.state()
    assert (state.threshold, state.percentile, page.controls.fps.value) == (0.7, 20, 5)
    assert main(["view", str(folder), "--port", "18090", "--no-open"]) == 0 and len(opened) == 1


def test_infer_shows_its_scene_after_the_report(interrupted, tmp_path, capsys):
    assert main(["infer", *SMALL, "--out", str(tmp_path), "--export", "trajectory,ply", "--view", "--moving", "0.6"]) == 0
    (page,) = interrupted
    *report, last = capsys.readouterr().out.splitlines()
    assert "files in" in "".join(report) and last == f"the scene is at {page.address} (Ctrl-C ends it)"
    assert page.controls.moving is None  # these formats need no mask, so it was not computed


@pytest.mark.usefixtures("no_viser")
def test_without_viser_nothing_is_computed(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("page4d.cli.infer.reconstruct", lambda *args, **options: pytest.fail("the model has run"))
    for arguments in (["infer", *SMALL, "--view"], ["view", str(folder)], ["view", str(folder), "--save", str(tmp_path / "a.html")]):
        assert main(arguments) == 2
        assert "need the package 'viser', which is not installed: pip install 'page4d[viewer]'" in error_line(capsys)


def test_infer_refuses_formats_without_a_scene(tmp_path, capsys, monkeypatch):
    pytest.importorskip("viser", reason="viser is not installed")
    monkeypatch.setattr("page4d.cli.infer.reconstruct", lambda *args, **options: pytest.fail("the model has run"))
    assert main(["infer", *SMALL, "--out", str(tmp_path), "--export", "mask,depth", "--view"]) == 2
    assert "--view needs depth and cameras, which --export mask,depth does not compute: add npz to it" in error_line(capsys)


def test_saved(folder, tmp_path, capsys):
    pytest.importorskip("viser", reason="viser is not installed")
    path = tmp_path / "new" / "scene.html"
    assert main(["view", str(folder), "--save", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path} (") and path.stat().st_size > 500_000
    assert main(["view", str(folder), "--save", str(tmp_path / "scene.glb")]) == 2
    assert "must end in .html" in error_line(capsys)


def test_mistakes(tmp_path, capsys):
    pytest.importorskip("viser", reason="viser is not installed")
    for arguments, words in [
        ([str(tmp_path / "nothing")], "does not exist: give the output folder"),
        ([str(tmp_path)], "there is no predictions.npz"),
        ([str(tmp_path), "--moving", "2"], "between 0 and 1"),
        ([str(tmp_path), "--port", "70000"], "between 1 and 65535"),
    ]:
        assert main(["view", *arguments]) == 2
        assert words in error_line(capsys)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_a_real_ctrl_c_ends_quietly(tmp_path):
    pytest.importorskip("viser", reason="viser is not installed")
    reconstruct(out=tmp_path, formats=["npz", "trajectory"], weights="random:tiny", frames=2, size=(28, 42))
    command = [sys.executable, "-m", "page4d", "view", str(tmp_path), "--no-open", "--port", "18100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        page = urllib.request.urlopen(line.split()[4], timeout=20).read()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)
    assert process.returncode == 0 and rest == ("", "") and b"<html" in page
