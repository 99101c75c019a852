"""Memory of the exports does not grow with the clip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json, sys
from benchmarks import export_memory
from page4d.export import colmap, glb, nerfstudio, rerun

for module in (colmap, glb, nerfstudio, rerun):
    module.MAX_POINTS = 1000
print(json.dumps(export_memory.main(["--frames", sys.argv[1], "--size", "168x252", "--formats", sys.argv[2]])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is counted by Linux")
@pytest.mark.parametrize("name", ["npz", "depth", "mask", "trajectory", "overview", "glb", "colmap", "nerfstudio", "rerun"])
def test_a_format_holds_no_map_of_the_whole_clip(tmp_path, name):
    """With few points. One fp32 map of all frames has 48 MiB, and who holds one also holds what it was computed from."""
    if name in ("glb", "rerun"):
        pytest.importorskip({"glb": "trimesh"}.get(name, name))
    variables = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, "300", name]
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    limit = 144 if name in ("glb", "rerun") else 72  # their libraries come on top
    assert json.loads(result.stdout.splitlines()[-1])[name] < limit * 2**20, result.stdout
