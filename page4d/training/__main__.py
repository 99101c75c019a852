"""python -m page4d.training CONFIG.yaml [KEY=VALUE ...] [--resume]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import UserError
from .config import load_config
from .trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m page4d.training", description="Train or fine-tune a model on synthetic scenes.")
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as steps=2000 data.seed=3")
    parser.add_argument("--resume", action="store_true", help="go on where the run in its folder stopped")
    parser.add_argument("--device", help="cuda or cpu (default: the best there is)")
    args = parser.parse_args(argv)
    try:
        trainer = Trainer(load_config(args.config, args.overrides), resume=args.resume, device=args.device)
        print(f"{trainer.trained:,} parameters are trained, on {trainer.device}; results go to {trainer.out}")
        values = trainer.train()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"step {trainer.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
