"""`benchmarks.gpu_check` without a GPU: its commands are those that exist, and a step that hangs costs no more than its time."""

from __future__ import annotations

import argparse
import fnmatch
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu_check, plan_time
from benchmarks.cases import cases
from page4d_kernels.qualify.__main__ import add_options


def test_it_fits_into_nine_minutes(tmp_path):
    assert sum(gpu_check.STEPS.values()) <= 540
    assert list(gpu_check.commands(tmp_path)) == list(gpu_check.STEPS)


def test_the_commands_parse(tmp_path):
    commands = gpu_check.commands(tmp_path)
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args(commands["qualify"][2:])
    assert args.force and args.seconds < gpu_check.STEPS["qualify"]
    assert command.build_parser("").parse_args(commands["benchmarks"][2:]).cases == gpu_check.CASES
    assert plan_time.build_parser().parse_args(commands["plans"][2:]).device == "cuda"
    for pattern in gpu_check.CASES:
        assert any(fnmatch.fnmatch(case.name, pattern) for case in cases()), pattern


@pytest.mark.slow
def test_the_tests_are_found(tmp_path):
    found = subprocess.run(
        [sys.executable, *gpu_check.commands(tmp_path)["tests"], "--collect-only"],
        capture_output=True, text=True,
    )  # fmt: skip
    without_a_gpu = pytest.ExitCode.NO_TESTS_COLLECTED  # the other exit codes are mistakes in the arguments
    assert found.returncode == (0 if torch.cuda.is_available() else without_a_gpu), found.stderr


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path, monkeypatch, capsys):
    child = tmp_path / "child"
    script = f"import subprocess, time; open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '100']).pid)); time.sleep(100)"
    monkeypatch.setattr(gpu_check, "STEPS", {"build": 3.0, "qualify": 60.0})
    monkeypatch.setattr(gpu_check, "commands", lambda out: {"build": ["-c", script], "qualify": ["-c", "print('found')"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path / "out")])
    assert gpu_check.main()
    assert "build: time limit exceeded after 3 s\nqualify: exit code 0" in capsys.readouterr().out
    assert (tmp_path / "out" / "qualification.txt").read_text() == "found\n"
    for _ in range(100):
        if subprocess.run(["ps", "-o", "stat=", "-p", child.read_text()], capture_output=True, text=True).stdout.strip("Z \n+") == "":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the child goes on")


def test_it_needs_a_gpu_and_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path / "out")])
    assert gpu_check.main() == 2 and "there is no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2 and capsys.readouterr().err.startswith("usage:")
