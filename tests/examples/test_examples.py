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
    "custom_dataset.py": "| scene-0 |",
    "video_to_point_cloud.py": "pixels stand still",
}


def run(name: str, folder: Path) -> str:
    result = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, cwd=folder, timeout=120)
    assert result.returncode == 0, result.stderr
    assert PRINTED[name] in result.stdout
    return result.stdout


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.py")) if path.name != "video_to_point_cloud.py"])
def test_example(name, tmp_path):
    run(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_point_cloud_has_the_static_pixels(tmp_path):
    static, _, pixels, *_ = run("video_to_point_cloud.py", tmp_path).split()
    cloud = trimesh.load(tmp_path / "static.ply")
    assert 0 < int(static) < int(pixels)
    assert len(cloud.vertices) == len(cloud.colors) == pytest.approx(int(static) / 2, rel=0.01)
