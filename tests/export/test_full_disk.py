"""Libraries that write files themselves: a disk that is full ends in one line, and leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, signal, sys
import torch
from page4d.data.frames import Frames
from page4d.errors import InputError
from page4d.export import ExportOptions, export
from page4d.prediction import Prediction

S, H, W = 2, 84, 112
pose = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 0.9, 1.1]]).repeat(1, S, 1)
depth = 1 + torch.rand(1, S, H, W, 1)
prediction = Prediction(torch.rand(1, S, 3, H, W), pose_enc=pose, depth=depth, depth_conf=1 + torch.rand(1, S, H, W))
same = torch.ones(S, 2, dtype=torch.float64), torch.zeros(S, 2, dtype=torch.float64)
frames = Frames(prediction.images[0], ["a", "b"], [0.0, 1.0], [(H, W)] * S, *same)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    export(prediction, frames, sys.argv[1], [sys.argv[2]], ExportOptions(depth_type="exr"))
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of the size of files to set")
@pytest.mark.parametrize(("name", "package"), [("rerun", "rerun.chunk"), ("depth", "OpenEXR"), ("glb", "trimesh")])
def test_one_line_and_no_file(tmp_path: Path, name: str, package: str) -> None:
    pytest.importorskip(package)
    result = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "out"), name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cannot write ") and result.stdout.count("\n") == 1, result.stdout
    assert str(tmp_path / "out") in result.stdout and not any((tmp_path / "out").rglob("*"))
