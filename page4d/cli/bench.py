"""`page4d bench ...` is `python -m benchmarks ...`. The benchmarks are in the source checkout, not in the installed package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .common import run_command

CHECKOUT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    if not all((CHECKOUT / file).is_file() for file in ("benchmarks/__main__.py", "infer.py")):  # any package may be called benchmarks
        return run_command(_refuse)
    sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module("benchmarks.__main__").main(argv, prog=prog)


def _refuse() -> str:
    raise InputError("the benchmarks are not installed with the package: clone the repository and install it with `pip install -e .`")
