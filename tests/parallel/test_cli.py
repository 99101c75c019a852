"""`page4d infer` under torchrun: same files as in one process, and what happens if a process fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

INFER = ["--frames", "7", "--export", "npz,trajectory,depth"]
MORE = {"OMP_NUM_THREADS": "1", "PAGE4D_DEADLINE": "30", "PAGE4D_QUALIFY": "off"}


def command(ranks, arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks else [sys.executable]
    return [*launcher, "-m", "page4d", "infer", *arguments]


def infer(ranks, out, *arguments, **variables):
    run = command(ranks, [*arguments, "--out", str(out)])
    return subprocess.run(run, capture_output=True, text=True, env=os.environ | MORE | variables, timeout=240)


def left_behind(folder):
    return [path for path in folder.rglob(".*") if path.is_file()] if folder.is_dir() else []


def assert_same(one, other, exact):
    with np.load(one / "predictions.npz") as a, np.load(other / "predictions.npz") as b:
        assert a.files == b.files
        for name in a.files:
            if a[name].dtype.kind != "f":
                assert (a[name] == b[name]).all(), name
            elif exact:
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
            else:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert not left_behind(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "arguments", "exact", "words"),
    [
        (2, [], False, "2 processes: 3 or 4 frames each; global attention by all-to-all of heads among 2 ranks"),
        (3, ["--attention", "balanced"], False, "3 processes: 2 or 3 frames each; global attention by a ring of 3 ranks"),
        (2, ["--chunk", "4,2"], False, "7 frames in 3 passes over 4 frames"),
        (3, ["--chunk", "2,1"], True, "3 processes are more than a pass has frames, 2: one of them does all"),
    ],
    ids=str,
)
def test_the_files_of_one_process(tmp_path, ranks, arguments, exact, words):
    alone = infer(0, tmp_path / "one", *INFER, *arguments)
    assert alone.returncode == 0, alone.stderr
    shared = infer(ranks, tmp_path / "many", *INFER, *arguments)
    assert shared.returncode == 0, shared.stderr
    assert words in shared.stderr
    assert shared.stderr.count("weights: nano") == 1 and shared.stdout.count("frames/s") == 1  # rank 0 speaks
    assert_same(tmp_path / "one", tmp_path / "many", exact)
    assert {path.name for path in (tmp_path / "one").rglob("*")} == {path.name for path in (tmp_path / "many").rglob("*")}


@pytest.mark.slow
def test_points_are_tracked(tmp_path):
    options = ["--weights", "random:tiny", "--track-grid", "3", "--frames", "5", "--size", "140x140", "--export", "npz"]
    for ranks, out in ((0, "one"), (2, "many")):
        result = infer(ranks, tmp_path / out, *options)
        assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "one", tmp_path / "many", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no_such_file.mp4"], "error: 'no_such_file.mp4' does not exist: check the path"),
        (["--frames", "many"], "error: argument --frames: invalid int value: 'many'; see page4d infer --help"),
        (["--track-grid", "3"], "error: these weights have no track head: for tracks use weights that have one, such as --weights vggt"),
        (["--device", "cuda"], "device 'cuda:"),
    ],
    ids=str,
)
def test_a_mistake_is_said_once(tmp_path, arguments, line):
    result = infer(2, tmp_path / "out", *arguments)
    assert result.returncode != 0
    said = [text for text in result.stderr.splitlines() if text.startswith("error:")]
    assert line in said[0] and len(said) <= 1 + ("cuda" in line), said  # before there is a group, each speaks for itself
    assert not left_behind(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"), [(["eval"], 1, "`page4d eval` runs in one process"), (["infer", "--help"], 0, "usage:")]
)
def test_other_commands_and_help(arguments, code, words):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "page4d", *arguments]
    result = subprocess.run(run, capture_output=True, text=True, env=os.environ | MORE, timeout=120)
    assert result.returncode == code and (result.stdout + result.stderr).count(words) == 1


def members(process):
    """The processes that torchrun has started, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            variables = dict(x.partition("=")[::2] for x in (folder / "environ").read_text().split("\0"))
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return found


FAILING = """
import os, sys, torch
from page4d.execution.ranks import Ranks
real, count = Ranks.start, 0

def start(*arguments):
    global count
    count += 1
    if count == 20:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return real(*arguments)

if os.environ["RANK"] == sys.argv.pop(1):
    Ranks.start = start
from page4d.cli.main import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("which", ["0", "1"])
def test_a_process_without_memory_ends_all(tmp_path, which):
    """Its reason is said, and no file stays."""
    (tmp_path / "failing.py").write_text(FAILING)
    run = [*command(2, [])[:4], str(tmp_path / "failing.py"), which, "infer", *INFER, "--out", str(tmp_path / "out")]
    start = time.monotonic()
    result = subprocess.run(run, capture_output=True, text=True, env=os.environ | MORE, timeout=120)
    assert result.returncode != 0 and time.monotonic() - start < 100
    said = [text for text in result.stderr.splitlines() if text.startswith("error:")]
    reason = "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)"
    wanted = (
        f"error: rank 1: {reason}" if which == "1" else "error: out of memory: use fewer --frames or a smaller --size (CUDA out of memory"
    )
    assert len(said) == 1 and said[0].startswith(wanted), said
    assert not list((tmp_path / "out").rglob("*")) and not left_behind(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_all(tmp_path, which):
    """In the middle of a run in chunks. What is done stays and is used by --resume; nothing temporary stays."""
    options = ["--chunk", "2,1", "--frames", "25", "--export", "npz", "--no-loops"]
    out = tmp_path / "out"
    run = command(2, [*options, "--out", str(out)])
    process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=os.environ | MORE)
    end = time.monotonic() + 120
    while len(list(out.glob("chunks/chunk_*"))) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(members(process)[which], signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and time.monotonic() - start < 90
    assert "SIGKILL" in errors or "Signal 9" in errors
    assert which == 0 or "error: ended by SIGTERM" in errors or "exited unexpectedly" in errors, errors
    assert not [path for path in left_behind(out) if path.stat().st_size > 1 << 16], "large temporary files"
    before = len(list(out.glob("chunks/chunk_*")))
    again = infer(2, out, *options, "--resume")
    assert again.returncode == 0, again.stderr
    assert before >= 3 and "going on with the run" in again.stderr
    whole = infer(2, tmp_path / "whole", *options)
    assert whole.returncode == 0
    assert_same(tmp_path / "whole", out, True)
    record = json.loads((out / "chunks.json").read_text())
    assert len(record["chunks"]) == 24
