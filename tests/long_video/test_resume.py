"""A run that is killed goes on, and gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from page4d.data.synthetic import SyntheticScenes
from page4d.data.video import write_video

COUNT = 70
WAIT = 240  # seconds


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "walk.mp4"
    write_video(path, SyntheticScenes("walk", frames=COUNT, size=(112, 168), seed=3, moving=2)[0].images, 10)
    return [sys.executable, "-m", "page4d", "infer", str(path), "--chunk", "16,4", "--export", "default,colmap", "--depth-size", "original"]


def results(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, which has the times at which they were written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True, timeout=WAIT)
    return results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["chunks/run.json", "chunks/chunk_00000.safetensors", "chunks/chunk_00003.safetensors", "depth/*.png"])
def test_killed_and_resumed(command, whole, tmp_path, moment):
    """Killed as soon as a file is there: at the start, after the first chunk, after the last but one, in the midst of the export."""
    out = tmp_path / "out"
    run = [*command, "--out", str(out), "--resume"]  # where there is nothing yet, it starts
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + WAIT
    while not list(out.glob(moment)):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it was killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    (out / ".0123abcd.png").write_bytes(b"half a picture")  # such as a killed export leaves
    assert (out / "chunks" / "run.json").is_file()
    again = subprocess.run(run, check=True, capture_output=True, text=True, timeout=WAIT)
    assert "going on with the run" in again.stderr
    assert results(out) == whole
