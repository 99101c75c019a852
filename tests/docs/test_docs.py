"""The README's snippets run, docs/api.md is in step with the docstrings, and relative links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

from page4d.data import bundled_clip

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_model_snippet_runs(tmp_path, monkeypatch):
    """With the bundled clip as my_video.mp4, and the bundled weights, as there is no network."""
    (code,) = [snippet for snippet in snippets() if "Page4D" in snippet]
    for asked, at_hand in (('from_pretrained("page4d-mask")', 'from_pretrained("nano")'), ("max_frames=16", "max_frames=4, size=(56, 84)")):
        assert asked in code
        code = code.replace(asked, at_hand)
    monkeypatch.chdir(tmp_path)
    shutil.copy(bundled_clip(), "my_video.mp4")
    exec(compile(code, "README.md", "exec"), {})
    assert Path("prediction.npz").is_file()


def test_the_kernel_snippet_runs():
    (code,) = [snippet for snippet in snippets() if "mask_attention(" in snippet]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape == (1, 16, 1786, 64)


def test_the_api_page_is_in_step_with_the_docstrings():
    page = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    if page != (ROOT / "docs" / "api.md").read_text():
        pytest.fail("docs/api.md is out of step: run `python docs/make_api.py`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken
