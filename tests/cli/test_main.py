"""`page4d COMMAND ...`: one help, one version, and the older ways to start each command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from page4d import __version__
from page4d.cli import bench
from page4d.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_help_names_every_command(capsys):
    assert exit_code("--help") == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name}" in printed and summary in printed for name, summary in COMMANDS.items())


def test_version(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.strip() == f"page4d {__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_under_its_own_name(command, capsys):
    assert exit_code(command, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: page4d {command}")


def test_an_unknown_command_is_one_line_that_names_the_commands(capsys):
    assert exit_code("video.mp4") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "unknown command 'video.mp4': choose one of infer, view, info, qualify, bench" in line and "page4d infer VIDEO" in line
    assert exit_code() == 2
    assert "error: no command: give one of infer, view, info, qualify, bench" in capsys.readouterr().err
    assert exit_code("--nonsense") == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
    assert exit_code("train") == 2
    assert "error: no configuration: give a YAML file" in capsys.readouterr().err


def test_the_output_may_be_cut_off_or_interrupted(monkeypatch, capsys):
    command = f"{sys.executable} -m page4d info"
    gone = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in gone.stderr and "Exception ignored" not in gone.stderr
    if Path("/dev/full").exists():
        full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, cwd=ROOT)
        assert full.returncode == 1 and "the report cannot be printed" in full.stderr and "Traceback" not in full.stderr

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupt)
    assert main(["info"]) == 130 and "interrupted" in capsys.readouterr().err


def test_options_go_to_the_command(capsys):
    assert main(["infer", "no such file.mp4"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert exit_code("info", "--no-such-option") == 2


def test_info_prints_what_the_kernels_print(capsys):
    assert main(["info"]) == 0
    assert "mask_attention on " in capsys.readouterr().out


def test_bench_outside_a_checkout_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert main(["bench", "list"]) == 2
    assert "clone the repository" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [
        ["-m", "page4d", "infer"],
        ["infer.py"],
        ["-m", "page4d.training"],
        ["-m", "page4d.evaluation"],
        ["-m", "page4d.data.synthetic"],
        ["-m", "benchmarks"],
    ],
    ids=" ".join,
)
def test_every_way_to_start_a_command(start):
    result = subprocess.run([sys.executable, *start, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and result.stdout.startswith("usage: "), result.stderr
