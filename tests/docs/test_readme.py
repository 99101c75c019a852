"""The README's snippets run as they stand, and relative links in the documents lead somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from page4d.data import bundled_clip

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# There is no network: the bundled weights stand in for the official ones, with the size that they need.
STAND_INS = {'from_pretrained("page4d-mask")': 'from_pretrained("nano")', "max_frames=16)": "max_frames=16, size=(56, 84))"}


def snippet(word: str) -> str:
    """The one Python snippet with this word in it."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL) if word in code]
    return code


def run(code: str) -> dict:
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_model_snippet_runs(tmp_path, monkeypatch):
    code = snippet("Page4D")
    for written, stand_in in STAND_INS.items():
        assert code.count(written) == 1
        code = code.replace(written, stand_in)
    monkeypatch.chdir(tmp_path)
    shutil.copy(bundled_clip(), "my_video.mp4")
    names = run(code)
    assert names["cameras"].extrinsics.shape == (1, 16, 3, 4) and names["cameras"].intrinsics.shape == (1, 16, 3, 3)
    assert names["points"].shape == (1, 16, 56, 84, 3) and names["confidence"].shape == (1, 16, 56, 84)
    assert names["moving"].shape == (1, 16, 8, 12) and names["moving"].any() and not names["moving"].all()
    assert Path("prediction.npz").is_file()


def test_the_snippet_of_one_call_runs(tmp_path, monkeypatch):
    code = snippet("reconstruct")
    assert code.count('weights="page4d-mask"') == 1
    monkeypatch.chdir(tmp_path)
    shutil.copy(bundled_clip(), "my_video.mp4")
    names = run(code.replace('"page4d-mask"', '"nano"'))
    assert names["points"].shape == (1, 16, 56, 84, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["my_video.mp4"]


def test_the_kernel_snippet_runs():
    assert run(snippet("mask_attention("))["out"].shape == (1, 16, 1786, 64)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken
