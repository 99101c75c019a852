"""docs/adding_a_backend.md lists exactly the files of an op: checked against one that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OP = "residual_norm"
# tests that combine several ops: useful for a new one too, but not needed
COMBINED = {"tests/kernels/test_gpu.py", "tests/kernels/test_triton_compiled.py"}


def listed() -> set[str]:
    section = (ROOT / "docs" / "adding_a_backend.md").read_text().partition("## An op")[2]
    return {path.replace("<op>", OP) for path in re.findall(r"^- `([^`]+)`", section, re.MULTILINE)}


def mentions() -> set[str]:
    folders = [ROOT / "page4d_kernels", ROOT / "benchmarks", ROOT / "tests" / "kernels"]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    found = [path for path in files if OP in path.read_text() or OP in path.as_posix()]
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_list_is_what_an_op_touches():
    assert listed() == mentions() - COMBINED


def test_an_op_is_at_most_twelve_files():
    assert len(listed()) <= 12 and all((ROOT / path).is_file() for path in listed())
