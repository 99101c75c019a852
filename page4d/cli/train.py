"""`page4d train CONFIG.yaml [KEY=VALUE ...] [--resume]`"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ..model.opening import open_device, own_device
from ..training.config import load_config
from ..training.trainer import WEIGHTS, Trainer
from .common import run_command, say
from .parser import Parser, first_speaks


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(prog, description="Train or fine-tune a model on synthetic scenes.")
    parser.add_argument("config", nargs="?", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as steps=2000 data.seed=3")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--device", help="cuda or cpu (default: the best available)")
    with first_speaks():
        args = parser.parse_intermixed_args(argv)  # overrides may follow options
        if args.config is None:
            parser.error("no configuration: give a YAML file such as configs/nano.yaml")
    return run_command(lambda: run(args), save_memory="set a smaller data.images or data.size, or checkpoint_activations=true")


def run(args: argparse.Namespace) -> str | None:
    """Train, and return the report. Only rank 0 has one."""
    config = load_config(args.config, args.overrides)
    trainer = Trainer(config, resume=args.resume, device=open_device(own_device(args.device)))
    if trainer.step >= config.steps:
        trainer.close()
        return None if trainer.rank > 0 else f"the run is finished: all {config.steps} steps are done, see {trainer.out / WEIGHTS}"
    if trainer.rank > 0:
        trainer.train()
        trainer.close()
        return None
    say(f"training {trainer.trained:,} parameters on {trainer.device}; results go to {trainer.out}")
    if config.precision == "bf16" and trainer.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        say("this processor has no bf16 instructions: precision=fp32 is several times as fast")
    values = trainer.train()
    trainer.close()
    return f"step {trainer.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
