"""Training with the frames of each sequence on several ranks."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch

from page4d import Page4D, preset
from page4d.errors import ConfigError
from page4d.training.batches import Batches
from page4d.training.config import load_config
from page4d.training.trainer import Objective

QUICK = [
    "data.size=[28, 42]", "data.frames=[3, 3]", "data.images=6", "data.kind=dynamic", "steps=2", "log_every=1", "trainable=all",
    "optimizer.lr=1e-3", "optimizer.mask_lr=1e-3", "optimizer.warmup=0", "optimizer.mask_warmup=0",
]  # fmt: skip


def objective(group, overrides):
    """The losses, and the gradients of all weights in fp64."""
    config = load_config(None, [*QUICK, *overrides])
    torch.manual_seed(1)
    model = Page4D(preset("nano").replace(depth=4, masked_blocks=(2, 3), mask_after=1, kept_layers=(0, 1, 2, 3))).double()
    losses = Objective(model, config.loss, None, group)(Batches(config.data, 0).batch(0).to(torch.float64), 8.0)
    losses["loss"].backward()
    return {name: float(x) for name, x in losses.items()}, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_of_gradients_is_that_of_one_process(team, ranks):
    """All ranks compute the same loss. The filters of the losses see all frames."""
    overrides = ["loss.mask=0.5"]
    losses, wanted = objective(None, overrides)
    parts = team.run(ranks, objective, overrides)
    for found, _ in parts:
        assert found == pytest.approx(losses, rel=1e-6)  # targets are in fp32
    worst = 0.0
    for name, gradient in wanted.items():
        mean = sum(part[1][name] for part in parts if name in part[1]) / ranks
        if "pos_embed" not in name:  # is resampled in fp32
            worst = max(worst, float((mean - gradient).norm()) / max(float(gradient.norm()), 1e-3))
    print(f"{len(wanted)} gradients, the worst {worst:.1e}")
    assert len(wanted) > 50 and worst <= 1e-12


def train(folder, ranks, *overrides):
    config = folder.parent / "empty.yaml"
    config.write_text("")
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks else []
    command = [sys.executable, *launcher, "-m", "page4d", "train", str(config), *QUICK, f"out={folder}", "--device", "cpu", *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "context", "alone"), [(2, 2, 0), (4, 2, 2)], ids=str)
def test_a_run_with_a_shared_context(tmp_path, ranks, context, alone):
    """Two processes with one sequence are as one process; four, in two pairs, are as two processes."""
    runs = {"shared": train(tmp_path / "shared", ranks, f"context={context}"), "alone": train(tmp_path / "alone", alone)}
    found = {}
    for name, result in runs.items():
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("training ") == 1  # rank 0 speaks
        with open(tmp_path / name / "log.csv", newline="") as file:
            found[name] = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert len(found["shared"]) == 2
    for one, other in zip(*found.values(), strict=True):
        for key in ("loss", "camera", "depth", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-3), key
    first = {name: rows[0]["gradient_norm"] for name, rows in found.items()}
    assert first["shared"] == pytest.approx(first["alone"], rel=1e-4)


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_fit(tmp_path):
    result = train(tmp_path / "run", 3, "context=2")
    assert result.returncode != 0
    assert "error: context: 2 processes share a sequence, and 3 are not a multiple" in result.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["context=4"], "data.frames: 3 frames are too few for a context of 4 processes"),
        (["context=0"], "context: 0 must be at least 1"),
        (["context=2", "loss.match=1"], "loss.match needs whole sequences"),
    ],
)
def test_what_does_not_fit_a_context(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, [*QUICK, *overrides])
