"""Runs: what is trained, at which rate, once per step, resumed to the bit, on one process and on two."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys

import pytest
import torch

from page4d.checkpoint import load_pretrained, save_official, save_pretrained
from page4d.config import PRESETS, preset
from page4d.errors import ConfigError, InputError
from page4d.model import Page4D
from page4d.training import Trainer, load_config
from page4d.training.__main__ import main
from page4d.training.batches import Batches, jitter, loader
from page4d.training.config import DataConfig, OptimizerConfig
from page4d.training.parameters import choose_trainable, learning_rate, make_optimizer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
QUICK = [
    "data.size=[28, 42]", "data.frames=[2, 3]", "data.images=4", "data.kind=dynamic", "loss.points=0", "steps=8", "log_every=1",
    "optimizer.lr=1e-3", "optimizer.mask_lr=1e-3", "trainable=all",
]  # fmt: skip


def run(tmp_path, *overrides, name="run", **options):
    return Trainer(load_config(None, [*QUICK, f"out={tmp_path / name}", *overrides]), device="cpu", **options)


def test_official_size_dry_run():
    """What the paper fine-tunes of an official checkpoint: 252 243 457 of its parameters."""
    with torch.device("meta"):
        model = Page4D(PRESETS["page4d-mask"].replace(track=None))
    assert choose_trainable(model, "middle") == 252_243_457
    groups = make_optimizer(model, OptimizerConfig()).param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == 252_243_457
    assert {(g["peak"], g["weight_decay"]) for g in groups} == {(2e-5, 0.02), (2e-5, 0.0), (1e-5, 0.01), (1e-5, 0.0)}
    aggregator = model.aggregator
    assert aggregator.global_blocks[10].training and not aggregator.global_blocks[9].training and not model.camera_head.training
    assert choose_trainable(model, "all") == sum(p.numel() for p in model.parameters())


def test_middle_needs_masked_blocks():
    with pytest.raises(ConfigError, match="middle needs a model with masked blocks"):
        choose_trainable(Page4D(preset("tiny").replace(masked_blocks=(0, 0), mask_strength=0.0)), "middle")


def test_learning_rate():
    assert learning_rate(0, 1.0, 0.1, 0.01) == 0.01 and learning_rate(0.05, 1.0, 0.1, 0.0) == 0.5
    assert learning_rate(0.1, 1.0, 0.1, 0.0) == 1.0 and abs(learning_rate(0.55, 1.0, 0.1, 0.0) - 0.5) < 1e-9
    assert learning_rate(1, 1.0, 0.1, 0.01) == pytest.approx(0.01)


def test_mask_schedule_and_learning_rates_follow_the_steps(tmp_path):
    trainer = run(
        tmp_path, "mask.hold_start=0.25", "mask.hold_end=0.75", "optimizer.warmup=0.5", "optimizer.mask_warmup=0.25", "log_every=1"
    )
    trainer.train()
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    wanted = [64, 64, *(32 * (1 + math.cos(math.pi * (n - 2) / 4)) for n in range(2, 6)), 0, 0]
    assert [float(row["mask_strength"]) for row in rows] == pytest.approx(wanted, abs=1e-3)


def test_resuming_is_exact(tmp_path):
    """8 steps are 4 steps, a new process' worth of state, and 4 steps; to the bit."""
    straight = run(tmp_path, name="straight")
    straight.train()
    run(tmp_path, name="halves").train(until=4)
    second = run(tmp_path, name="halves", resume=True)
    assert second.step == 4
    second.train()
    for (name, a), b in zip(straight.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(straight.optimizer.state_dict()["state"].values(), second.optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    weights = load_pretrained(tmp_path / "halves" / "model.safetensors")
    assert weights.config == preset("nano")
    static = run(tmp_path, "mask.strength=0", "steps=1", name="static")
    static.train()
    assert load_pretrained(tmp_path / "static" / "model.safetensors").config.mask_strength == 0  # used as it was trained
    assert torch.equal(weights.camera_head.embed_pose.weight, second.model.camera_head.embed_pose.weight)


def test_one_step_with_clipped_gradients(tmp_path):
    """The optimiser steps once per iteration, with gradients of the stated norm at most, averaged over micro-batches."""
    trainer = run(tmp_path, "optimizer.clip=0.01", "accumulation=2", "optimizer.warmup=0.0", "optimizer.mask_warmup=0.0", "steps=1")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"] if p.grad is not None])
    )
    trainer.train()
    assert len(seen) == 1
    norm = torch.stack([g.norm() for g in seen[0]]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert "aggregator.camera_token" in moved and "depth_head.norm.weight" in moved
    assert "aggregator.spatial_mask_head.head0.0.weight" in moved  # the mask learns through attention alone


def test_middle_leaves_the_rest_alone(tmp_path):
    trainer = run(tmp_path, "trainable=middle", "steps=2")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    first, end = trainer.model.config.masked_blocks
    for name, p in trainer.model.named_parameters():
        parts = name.split(".")
        inside = parts[1] == "spatial_mask_head" or (parts[1] in ("frame_blocks", "global_blocks") and first <= int(parts[2]) < end)
        assert torch.equal(p, before[name]) != inside or (p - before[name]).abs().max() == 0, name
        assert p.requires_grad == inside, name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_fine_tuning_starts_from_a_file_and_leaves_it_alone(tmp_path, suffix):
    torch.manual_seed(5)
    model, path = Page4D(preset("nano")), tmp_path / f"start{suffix}"
    (save_pretrained if suffix == ".safetensors" else save_official)(model, path)
    content = path.read_bytes()
    trainer = run(tmp_path, f"weights={path}", "trainable=middle", "steps=2")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    trainer.train()
    first = model.config.masked_blocks[0]
    assert not torch.equal(
        trainer.model.aggregator.frame_blocks[first].attn.proj.weight, model.aggregator.frame_blocks[first].attn.proj.weight
    )
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="does not fit the model"):
        run(tmp_path, f"weights={path}", "model=tiny", "loss.points=1", name="other")


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    a = run(tmp_path, "steps=2", name="a")
    b = run(tmp_path, "steps=2", "checkpoint_activations=true", name="b")
    calls = []
    b.model.aggregator.global_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    a.train(), b.train()
    assert len(calls) == 4  # twice a step: forward, and again in backward
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_bf16(tmp_path):
    values = run(tmp_path, "precision=bf16", "steps=3").train()
    assert math.isfinite(values["loss"])


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    trainer = run(tmp_path, "steps=60", "data.frames=[2, 2]", "data.images=8", "data.jitter=0", "mask.strength=0", "data.kind=static")
    trainer.train()
    with open(tmp_path / "run" / "log.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert sum(losses[-10:]) / 10 < 0.4 * sum(losses[:5]) / 5


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    from page4d.training import trainer as module

    trainer = run(tmp_path)
    real = module.total_loss
    monkeypatch.setattr(module, "total_loss", lambda *a: {name: value * math.nan for name, value in real(*a).items()})
    with pytest.raises(module.TrainingError, match="the loss at step 0 is not finite"):
        trainer.train()
    assert not (tmp_path / "run" / "state.pt").exists()


def test_batches_depend_on_the_step_alone():
    config = DataConfig(size=(28, 42), frames=(2, 3), images=6)
    alone, later = Batches(config, 0).batch(5), next(loader(Batches(config, 5), 0))
    assert torch.equal(alone.images, later.images) and torch.equal(alone.extrinsics, later.extrinsics)
    other_rank = Batches(config, 5, rank=1, ranks=2).batch(5)
    assert other_rank.images.shape == Batches(config, 5, rank=0, ranks=2).batch(5).images.shape
    assert not torch.equal(other_rank.images, Batches(config, 5, rank=0, ranks=2).batch(5).images)


@pytest.mark.slow
def test_workers_keep_the_order():
    config = DataConfig(size=(14, 28), frames=(1, 2), images=2)
    stream = loader(Batches(config, 3), 2)
    for index in range(3, 7):
        assert torch.equal(next(stream).images, Batches(config, 0).batch(index).images)


def test_jitter():
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(jitter(images, 0.0, torch.Generator().manual_seed(1)), images)
    changed = jitter(images, 1.0, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1 and not torch.equal(changed, images)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Gradients are the mean over the processes' batches: one step by torchrun is one step here with both batches."""
    options = [f"out={tmp_path / 'two'}", *QUICK, "steps=1", "optimizer.warmup=0", "optimizer.mask_warmup=0"]
    config = tmp_path / "empty.yaml"
    config.write_text("")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "page4d.training",
        str(config),
        *options,
        "--device",
        "cpu",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    trainer = run(tmp_path, "steps=1", "optimizer.warmup=0", "optimizer.mask_warmup=0", name="one")
    for rank in (0, 1):
        batch = Batches(trainer.config.data, 0, rank, 2).batch(0)
        (trainer.objective(batch, 64.0)["loss"] / 2).backward()
    torch.nn.utils.clip_grad_norm_(list(trainer.model.parameters()), 1.0)
    from page4d.training.parameters import set_learning_rates

    set_learning_rates(trainer.optimizer, 0.0, trainer.config.optimizer.floor)
    trainer.optimizer.step()
    found = torch.load(tmp_path / "two" / "state.pt", weights_only=True)["model"]
    start = Page4D(preset("nano")).state_dict()
    for name, value in trainer.model.state_dict().items():
        # AdamW's first step is the sign of the gradient: where that is tiny, rounding may turn it
        agree = (found[name] - value).abs() < 1e-5
        assert agree.float().mean() > 0.98, name
    assert set(found) == set(start)


def test_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\ndata: {kind: dynamic}\noptimizer: {lr: 1e-4}\n")
    config = load_config(path, ["data.seed=7", "mask.hold_end=1"])
    assert (config.steps, config.data.kind, config.optimizer.lr, config.data.seed, config.mask.hold_end) == (5, "dynamic", 1e-4, 7, 1.0)
    for text, message in {
        "stepz=5": "unknown key stepz", "data=3": "data is a group", "data.frames=[4, 2]": "data.frames",
        "steps": "is no override", "steps=many": "steps has to be of type int", "optimizer.lr=-1": "optimizer.lr",
        "precision=fp8": "precision", "data.images=1": "does not hold one sequence",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load_config(None, [text])
    path.write_text("steps: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.yaml")


def test_shipped_configurations():
    folder = os.path.join(ROOT, "configs")
    names = sorted(os.listdir(folder))
    assert names
    for name in names:
        config = load_config(os.path.join(folder, name))
        assert config.model in PRESETS


def test_a_run_is_not_overwritten(tmp_path, capsys):
    run(tmp_path, "steps=1").train()
    with pytest.raises(InputError, match="holds a run already: continue it with --resume"):
        run(tmp_path)
    with pytest.raises(InputError, match=r"belongs to another configuration \(seed"):
        run(tmp_path, "steps=1", "seed=9", resume=True)
    with pytest.raises(InputError, match="nothing to resume"):
        run(tmp_path, name="other", resume=True)
    (tmp_path / "run" / "state.pt").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path, "steps=1", resume=True)
    capsys.readouterr()
    assert main([str(tmp_path / "missing.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read")


def test_a_loss_without_its_head(tmp_path):
    with pytest.raises(ValueError, match=r"loss.points is 1.0, but the model has no points head"):
        run(tmp_path, "loss.points=1")
