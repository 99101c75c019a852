"""docs/adding_a_backend.md lists exactly the files of an op. The list is checked against an existing op."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OP = "residual_norm"
FOLDERS = ("page4d_kernels", "benchmarks", "tests/kernels")
NOT_NEEDED = {  # files that mention the op but need no change for a new one
    "benchmarks/host_time.py": "measures several ops by name",
    "tests/kernels/test_gpu.py": "captures several ops in one CUDA graph",
    "tests/kernels/test_triton_compiled.py": "checks the launch grids of several ops by name",
}


def listed() -> list[str]:
    """The paths of the list in the section "An op", with the name of the op filled in."""
    section = (ROOT / "docs" / "adding_a_backend.md").read_text().partition("\n## An op\n")[2]
    return [path.replace("<op>", OP) for path in re.findall(r"^- `([^`]+)`:", section, re.MULTILINE)]


def mentioned() -> set[str]:
    """The Python files that contain the name of the op or have it in their path."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    return {name for name, text in names.items() if OP in name or OP in text}


def test_an_op_is_at_most_twelve_files_and_all_exist():
    files = listed()
    assert 0 < len(files) <= 12 and len(set(files)) == len(files)
    assert [path for path in files if not (ROOT / path).is_file()] == []


def test_the_list_names_every_file_of_the_op():
    missing = mentioned() - set(listed()) - set(NOT_NEEDED)
    assert not missing, f"{OP} also touches {sorted(missing)}: list them, or remove the need to touch them"


def test_the_list_names_no_other_file():
    assert set(listed()) <= mentioned()


def test_the_exceptions_are_current():
    assert set(NOT_NEEDED) <= mentioned()
