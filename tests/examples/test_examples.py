"""Every example runs as its docstring says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trimesh

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PRINTED = {
    "attention_gradients.py": "gradient of c: largest",
    "custom_backend.py": "mask_attention: backend 'mine' cannot serve this: its logits take N x N memory: at most 1000 keys, not 2000",
    "custom_dataset.py": "| scene-1 |",
    "video_to_point_cloud.py": "static points",
}


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.py"))])
def test_example(name, tmp_path):
    result = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert PRINTED[name] in result.stdout
    if name == "video_to_point_cloud.py":
        cloud = trimesh.load(tmp_path / "static.ply")
        assert len(cloud.vertices) == int(result.stdout.split()[0]) > 1000 and len(cloud.colors) == len(cloud.vertices)
