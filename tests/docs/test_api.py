"""docs/api.md is what its generator writes now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_api_page_is_in_step_with_the_docstrings():
    page = runpy.run_path(str(DOCS / "make_api.py"))["page"]()
    if page != (DOCS / "api.md").read_text():
        pytest.fail("docs/api.md is out of step: run `python docs/make_api.py`")
    assert all(f"`{name}" in page for name in ("Page4D", "Prediction.points(self, source: str = 'depth')", "mask_attention("))
