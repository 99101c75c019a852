"""Configurations: files, overrides and errors."""

from __future__ import annotations

import os

import pytest

from page4d.config import PRESETS
from page4d.errors import ConfigError
from page4d.training import load_config

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_files_and_overrides_are_read_and_mistakes_are_errors(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\ndata: {kind: dynamic}\noptimizer: {lr: 1e-4}\n")
    config = load_config(path, ["data.seed=7", "mask.hold_end=1"])
    assert (config.steps, config.data.kind, config.optimizer.lr, config.data.seed, config.mask.hold_end) == (5, "dynamic", 1e-4, 7, 1.0)
    for text, message in {
        "stepz=5": "unknown key stepz", "data=3": "data is a group", "data.frames=[4, 2]": "data.frames",
        "steps": "is not an override", "steps=many": "steps must be of type int", "optimizer.lr=-1": "optimizer.lr",
        "precision=fp8": "precision", "data.images=1": "is too small for a sequence of 8 frames", "data.kind=moving": "data.kind: 'moving'",
        "optimizer.kind=sgd": "optimizer.kind: 'sgd' must be adamw or muon",
        "data.workers=-1": "data.workers", "data.noise=.nan": "data.noise", "data.noise=-0.1": "data.noise",
        "data.jitter=1.5": "data.jitter",
        "data.size=[28, 40]": "multiples of 14", "data.size=[0, 14]": "multiples of 14", "data.supersample=0": "data.supersample",
        "data.seed=-1": "data.seed", "seed=4294967296": "seed", "optimizer.warmup=2": "optimizer.warmup",
        "optimizer.lr=nan": "optimizer.lr", "average=1": "average", "trainable=some": "must be all, middle or dense",
        "optimizer.floor=1": "optimizer.lr must be at least", "optimizer.clip=0": "optimizer.clip", "mask.strength=.inf": "mask.strength",
        "steps=2020-02-31": "not YAML",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            load_config(None, [text])
    path.write_text("steps: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)
    path.write_bytes(b"out: caf\xe9")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.yaml")


def test_every_shipped_configuration_loads():
    folder = os.path.join(ROOT, "configs")
    names = sorted(os.listdir(folder))
    assert names
    for name in names:
        config = load_config(os.path.join(folder, name))
        assert config.model in PRESETS


def test_the_attention_plan_is_checked_before_the_run(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"layers": ["dense", "frame", [2, 2], [2, 2], [2, 2], [2, 2]]}')
    assert load_config(None, [f"attention={path}"]).attention == str(path)
    for overrides, words in (
        (["attention=turbo"], "attention: unknown attention plan 'turbo'"),
        ([f"attention={path}", "model=tiny"], "attention: the attention plan has 6 layers, and the model 24"),
        (["attention=missing.json"], "attention: cannot read the attention plan"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(None, overrides)
