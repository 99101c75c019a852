"""Runs: the trained parameters, schedules, optimiser steps, exact resumption, and two processes."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from page4d.cli.train import main
from page4d.config import PlansConfig, preset
from page4d.errors import ConfigError, InputError
from page4d.model import Page4D
from page4d.model.checkpoint import save_official, save_pretrained, stored_config
from page4d.model.opening import own_device
from page4d.training import Trainer, load_config
from page4d.training.batches import Batches
from page4d.training.parameters import choose_trainable, learning_rate, make_optimizers
from page4d.training.trainer import TrainingError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
QUICK = [
    "data.size=[28, 42]", "data.frames=[2, 3]", "data.images=4", "data.kind=dynamic", "steps=8", "log_every=1",
    "optimizer.lr=1e-3", "optimizer.mask_lr=1e-3", "trainable=all",
]  # fmt: skip


def run(tmp_path, *overrides, name="run", **options):
    return Trainer(load_config(None, [*QUICK, f"out={tmp_path / name}", *overrides]), device="cpu", **options)


def logged(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def gradients(trainer):
    """A list that gets the gradients of every optimiser step from now on, after clipping."""
    found = []
    (optimizer,) = trainer.optimizers
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: found.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"] if p.grad is not None])
    )
    return found


def test_the_official_size_trains_as_many_parameters_as_the_paper():
    """The paper fine-tunes 252 243 457 parameters of an official checkpoint."""
    config = load_config(os.path.join(ROOT, "configs", "page4d_finetune.yaml"))
    with torch.device("meta"):
        model = Page4D(preset(config.model).replace(track=None))
    assert choose_trainable(model, config.trainable) == 252_243_457
    (optimizer,) = make_optimizers(model.named_parameters(), config.optimizer)
    groups = optimizer.param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == 252_243_457
    assert {(g["peak"], g["weight_decay"]) for g in groups} == {(2e-5, 0.02), (2e-5, 0.0), (1e-5, 0.01), (1e-5, 0.0)}
    aggregator = model.aggregator
    assert aggregator.global_blocks[10].training and not aggregator.global_blocks[9].training and not model.camera_head.training
    assert choose_trainable(model, "all") == sum(p.numel() for p in model.parameters())


def test_middle_needs_masked_blocks():
    with pytest.raises(ConfigError, match="middle needs a model with masked blocks"):
        choose_trainable(Page4D(preset("tiny").replace(masked_blocks=(0, 0), mask_strength=0.0)), "middle")


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    assert learning_rate(0, 1.0, 0.1, 0.01) == 0.01 and learning_rate(0.05, 1.0, 0.1, 0.0) == 0.5
    assert learning_rate(0.1, 1.0, 0.1, 0.0) == 1.0 and abs(learning_rate(0.55, 1.0, 0.1, 0.0) - 0.5) < 1e-9
    assert learning_rate(1, 1.0, 0.1, 0.01) == pytest.approx(0.01)


def test_mask_schedule_and_learning_rates_follow_the_steps(tmp_path):
    trainer = run(
        tmp_path, "mask.hold_start=0.25", "mask.hold_end=0.75", "optimizer.warmup=0.5", "optimizer.mask_warmup=0.25", "log_every=1"
    )
    trainer.train()
    rows = logged(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    rates = [max(learning_rate(n / 8, 1e-3, warmup, 1e-8) for warmup in (0.25, 0.5)) for n in range(8)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates, rel=1e-4)
    wanted = [64, 64, *(32 * (1 + math.cos(math.pi * (n - 2) / 4)) for n in range(2, 6)), 0, 0]
    assert [float(row["mask_strength"]) for row in rows] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="adamw"),
        pytest.param(["optimizer.kind=muon", "average=0.6"], id="muon, averaged"),
        pytest.param(["optimizer.kind=muon", "average=0.6", "precision=bf16"], id="muon, averaged, bf16", marks=pytest.mark.slow),
    ],
)
def test_resuming_is_exact(tmp_path, options):
    """4 steps equal 2 steps, a resumption from the files, and 2 steps; to the bit."""
    options = [*options, "steps=4"]
    straight = run(tmp_path, *options, name="straight")
    straight.train()
    run(tmp_path, *options, name="halves").train(max_step=2)
    second = run(tmp_path, *options, name="halves", resume=True)
    assert second.step == 2
    second.train()
    for (name, a), b in zip(straight.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [[s for o in trainer.optimizers for s in o.state_dict()["state"].values()] for trainer in (straight, second)]
    for a, b in zip(*states, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    weights = Page4D.from_pretrained(tmp_path / "halves" / "model.safetensors", device="cpu")
    assert weights.config == preset("nano").replace(image_size=(28, 42))
    static = run(tmp_path, "mask.strength=0", "steps=1", name="static")
    static.train()
    saved = Page4D.from_pretrained(tmp_path / "static" / "model.safetensors", device="cpu")
    assert saved.config.mask_strength == 0  # the strength of training
    other = Page4D.from_pretrained(tmp_path / "straight" / "model.safetensors", device="cpu")
    for (name, a), b in zip(weights.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    unchanged = torch.equal(weights.camera_head.embed_pose.weight, second.model.camera_head.embed_pose.weight)
    assert unchanged == (not second.config.average)


def test_the_saved_weights_are_the_running_mean(tmp_path):
    """A plain mean at first, then an exponential one with decay `average`."""
    trainer, seen = run(tmp_path, "average=0.6", "steps=4"), []
    for step in range(1, 5):
        trainer.train(max_step=step)
        seen.append(trainer.model.camera_head.embed_pose.weight.detach().double())
    mean = seen[0]
    for share, weight in zip((1 / 2, 0.4, 0.4), seen[1:], strict=True):
        mean = mean + share * (weight - mean)
    kept = Page4D.from_pretrained(tmp_path / "run" / "model.safetensors", device="cpu")
    assert torch.allclose(kept.camera_head.embed_pose.weight.double(), mean, atol=1e-7, rtol=1e-6)
    assert not torch.allclose(mean, seen[-1], atol=1e-5) and kept.config == trainer.model.config


def test_an_iteration_is_one_step_with_clipped_gradients(tmp_path):
    """Gradients are averaged over micro-batches and have at most the stated norm."""
    trainer = run(tmp_path, "optimizer.clip=0.01", "accumulation=2", "optimizer.warmup=0.0", "optimizer.mask_warmup=0.0", "steps=1")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    seen = gradients(trainer)
    trainer.train()
    assert len(seen) == 1
    norm = torch.stack([g.norm() for g in seen[0]]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert "aggregator.camera_token" in moved and "depth_head.norm.weight" in moved
    assert "aggregator.spatial_mask_head.head0.0.weight" in moved  # the mask learns only through attention


def test_micro_batches_are_averaged(tmp_path):
    """Gradients and logged losses of a step are the means over its micro-batches."""
    trainer = run(tmp_path, "optimizer.clip=1e9", "accumulation=2", "steps=1")
    batches = [Batches(trainer.config.data, 0).batch(i) for i in (0, 1)]
    losses = [trainer.objective(batch, 64.0)["loss"] for batch in batches]
    mean = sum(losses) / 2
    parameters = [p for g in trainer.optimizers[0].param_groups for p in g["params"]]
    wanted = [g for g in torch.autograd.grad(mean, parameters, allow_unused=True) if g is not None]
    seen = gradients(trainer)
    assert trainer.train()["loss"] == pytest.approx(mean.item(), rel=1e-5)
    for a, b in zip(seen[0], wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_each_step_has_its_micro_batches(tmp_path, monkeypatch):
    """Steps 0, 1, 2 of two micro-batches take batches 0 to 5, whether or not the run was resumed in between."""
    seen, real = [], Batches.batch
    monkeypatch.setattr(Batches, "batch", lambda self, index: seen.append(index) or real(self, index))
    options = ["accumulation=2", "steps=3", "trainable=middle"]
    run(tmp_path, *options).train(max_step=1)
    run(tmp_path, *options, resume=True).train()
    assert seen == list(range(6))


def test_middle_trains_masked_blocks_and_mask_head_only(tmp_path):
    trainer = run(tmp_path, "trainable=middle", "steps=2")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    first, end = trainer.model.config.masked_blocks
    for name, p in trainer.model.named_parameters():
        parts = name.split(".")
        inside = parts[1] == "spatial_mask_head" or (parts[1] in ("frame_blocks", "global_blocks") and first <= int(parts[2]) < end)
        assert torch.equal(p, before[name]) != inside or (p - before[name]).abs().max() == 0, name
        assert p.requires_grad == inside, name


def test_dense_trains_the_depth_head_only(tmp_path):
    """Nothing that cameras or mask depend on changes."""
    trainer = run(tmp_path, "trainable=dense", "loss.camera=0", "steps=2")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("depth_head.") for name in moved)
    assert trainer.trained == sum(p.numel() for p in trainer.model.depth_head.parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_fine_tuning_starts_from_a_file_and_does_not_change_it(tmp_path, suffix):
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
    has_config = suffix == ".safetensors"
    with pytest.raises(ValueError, match="does not match the preset 'tiny'" if has_config else "does not fit the model"):
        run(tmp_path, f"weights={path}", "model=tiny", name="other")


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    a = run(tmp_path, "steps=2", name="a")
    b = run(tmp_path, "steps=2", "checkpoint_activations=true", name="b")
    calls = []
    b.model.aggregator.global_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    a.train(), b.train()
    assert len(calls) == 4  # twice a step: forward, and again in backward
    for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_bf16_is_close_to_fp32_and_not_equal(tmp_path):
    half, full = (run(tmp_path, f"precision={name}", "steps=1", name=name).train()["loss"] for name in ("bf16", "fp32"))
    assert half != full and half == pytest.approx(full, rel=0.05)


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    trainer = run(tmp_path, "steps=60", "data.frames=[2, 2]", "data.images=8", "data.jitter=0", "mask.strength=0", "data.kind=static")
    trainer.train()
    losses = [float(row["loss"]) for row in logged(tmp_path / "run")]
    assert sum(losses[-10:]) / 10 < 0.4 * sum(losses[:5]) / 5


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    from page4d.training import trainer as module

    trainer = run(tmp_path)
    real = module.total_loss
    monkeypatch.setattr(module, "total_loss", lambda *a: {name: value * math.nan for name, value in real(*a).items()})
    with pytest.raises(module.TrainingError, match="the loss at step 0 is not finite"):
        trainer.train()
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    trainer = run(tmp_path)
    trainer.model.camera_head.embed_pose.weight.register_hook(lambda gradient: gradient * math.nan)
    before = trainer.model.aggregator.camera_token.detach().clone()
    with pytest.raises(TrainingError, match="the gradient's norm is nan at step 0"):
        trainer.train()
    assert torch.equal(trainer.model.aggregator.camera_token, before) and not (tmp_path / "run" / "state.pt").exists()


def test_a_run_is_saved_every_few_steps_and_at_the_end(tmp_path, monkeypatch):
    """`max_step` ends the run early; 0 ends it at once."""
    trainer, saved = run(tmp_path, "save_every=3", "trainable=middle"), []
    monkeypatch.setattr(trainer, "save", lambda: saved.append(trainer.step))
    assert trainer.train(max_step=0) == {} and trainer.step == 0 and saved == []
    trainer.train()
    assert saved == [3, 6, 8]


def test_the_log_of_a_resumed_run_has_one_row_per_step(tmp_path):
    """Also if the run got further than its saved state. A new run starts a new log."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.csv").write_text("step,other\n1,5\n")
    options = ["steps=4", "trainable=middle"]
    first = run(tmp_path, *options)
    first.train(max_step=2)
    assert [row["step"] for row in logged(folder)] == ["1", "2"] and "other" not in logged(folder)[0]
    state = (folder / "state.pt").read_bytes()
    first.train(max_step=3)
    (folder / "state.pt").write_bytes(state)
    assert len(logged(folder)) == 3
    before = logged(folder)[:2]
    run(tmp_path, *options, resume=True).train()
    assert [row["step"] for row in logged(folder)] == ["1", "2", "3", "4"] and logged(folder)[:2] == before


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    """One step of torchrun with two processes equals one step of this process with both batches."""
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

    set_learning_rates(trainer.optimizers, 0.0, trainer.config.optimizer.floor)
    trainer.optimizers[0].step()
    found = torch.load(tmp_path / "two" / "state.pt", weights_only=True)["model"]
    start = Page4D(preset("nano")).state_dict()
    for name, value in trainer.model.state_dict().items():
        # AdamW's first step is the sign of the gradient, and rounding may flip the sign of a tiny one
        agree = (found[name] - value).abs() < 1e-5
        assert agree.float().mean() > 0.98, name
    assert set(found) == set(start)


def test_a_run_is_not_overwritten(tmp_path, capsys):
    run(tmp_path, "steps=1").train()
    with pytest.raises(InputError, match="already holds a run: continue it with --resume"):
        run(tmp_path)
    with pytest.raises(InputError, match=r"belongs to another configuration \(seed, optimizer.lr differ"):
        run(tmp_path, "steps=1", "seed=9", "optimizer.lr=1", resume=True)
    with pytest.raises(InputError, match="nothing to resume"):
        run(tmp_path, name="other", resume=True)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "run" / "state.pt")
    with pytest.raises(InputError, match="is not the state of a run"):
        run(tmp_path, "steps=1", resume=True)
    (tmp_path / "run" / "state.pt").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path, "steps=1", resume=True)
    capsys.readouterr()
    assert main([str(tmp_path / "missing.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read")


@pytest.mark.parametrize(("capability", "precision"), [("AVX2", "bf16"), ("AVX2", "fp32"), ("AVX512", "bf16")])
def test_bf16_without_bf16_instructions_prints_a_hint(tmp_path, monkeypatch, capsys, capability, precision):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = tmp_path / "run.yaml"
    config.write_text(f"out: {tmp_path / 'run'}\n")
    assert main([str(config), *QUICK, "--device", "cpu", "steps=1", f"precision={precision}"]) == 0
    said = "precision=fp32 is several times as fast" in "".join(capsys.readouterr())
    assert said == (capability == "AVX2" and precision == "bf16")


def test_a_resumed_run_may_change_what_does_not_affect_results(tmp_path, monkeypatch, capsys):
    """Not the number of processes. A finished run says so, whatever the order on the command line."""
    run(tmp_path, "steps=1").train()
    harmless = ["log_every=7", "save_every=9", "data.workers=1", "checkpoint_activations=true"]
    assert run(tmp_path, "steps=1", *harmless, resume=True).step == 1
    config = tmp_path / "run.yaml"
    config.write_text(f"out: {tmp_path / 'run'}\n")
    capsys.readouterr()
    assert main([str(config), "--resume", *QUICK, "--device", "cpu", "steps=1"]) == 0
    assert capsys.readouterr().out.startswith("the run is finished: all 1 steps are done")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box: None)
    with pytest.raises(InputError, match="belongs to a run of 1 processes, and this one has 2"):
        run(tmp_path, "steps=1", resume=True)


def test_every_process_reports_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box: sent.extend(box))
    with pytest.raises(InputError, match="cannot write into"):
        run(tmp_path, name="file/run")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda box: box.__setitem__(0, sent[0]))
    monkeypatch.setattr("page4d.training.trainer.check_writable", lambda folder: pytest.fail("one process is enough"))
    with pytest.raises(InputError, match="cannot write into"):
        run(tmp_path, name="file/run")


def test_each_process_uses_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device(None) is None and own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(name) for name in (None, "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(None) is None


def test_weights_of_another_model_are_an_error(tmp_path):
    """The error names what differs, even if every key fits. What a run sets itself may differ."""
    other = preset("nano").replace(masked_blocks=(2, 4), rope_base=10.0, layer_scale=0.01)
    save_pretrained(Page4D(other), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"does not match the preset 'nano' \(rope_base, masked_blocks differ\): set model"):
        run(tmp_path, f"weights={tmp_path / 'other.safetensors'}")
    run(tmp_path, "mask.strength=0", "steps=1", name="first").train()
    weights = tmp_path / "first" / "model.safetensors"
    run(tmp_path, f"weights={weights}", name="second")
    save_official(Page4D(preset("tiny")), tmp_path / "official.pt")
    run(tmp_path, f"weights={tmp_path / 'official.pt'}", "model=tiny", "steps=1", name="third").train()
    saved = Page4D.from_pretrained(tmp_path / "third" / "model.safetensors", device="cpu")
    assert saved.config.image_size is None  # the initial weights work at other sizes too


def test_a_loss_without_its_head_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"loss.points is 1.0, but the model has no points head"):
        run(tmp_path, "loss.points=1")


def test_a_run_with_an_attention_plan(tmp_path):
    """The plan changes the losses, and the gradients are those of the plan."""
    exact, thin = (run(tmp_path, f"attention={plan}", "steps=2", name=plan) for plan in ("exact", "fast"))
    losses = [trainer.train()["loss"] for trainer in (exact, thin)]
    assert losses[0] != losses[1] and all(map(math.isfinite, losses))
    with pytest.raises(InputError, match="attention differ"):
        run(tmp_path, "attention=balanced", "steps=2", name="fast", resume=True)


def test_weights_keep_their_own_plans_and_the_one_they_were_trained_with(tmp_path):
    own = PlansConfig(fast=((2, 2),) * 5 + ("dense",))
    weights = save_pretrained(Page4D(preset("nano").replace(plans=own)), tmp_path / "own.safetensors")
    trainer = run(tmp_path, f"weights={weights}", "attention=fast", "steps=1", name="a")
    assert trainer.attention.layers == own.fast
    trainer.train()
    assert stored_config(tmp_path / "a" / "model.safetensors").plans == own
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "balanced", "layers": ["dense", "frame", *[[2, 3]] * 4]}))
    run(tmp_path, f"weights={weights}", f"attention={path}", "steps=1", name="b").train()
    assert stored_config(tmp_path / "b" / "model.safetensors").plans == PlansConfig(("dense", "frame", *[(2, 3)] * 4), own.fast)
    path.write_text(json.dumps({"name": "balanced", "layers": ["frame", "frame", *[[2, 3]] * 4]}))
    with pytest.raises(InputError, match="belongs to a run with another attention plan"):
        run(tmp_path, f"weights={weights}", f"attention={path}", "steps=1", name="b", resume=True)
