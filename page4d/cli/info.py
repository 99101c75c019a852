"""`page4d info`: what `python -m page4d_kernels.info` prints."""

from __future__ import annotations

from collections.abc import Sequence

from page4d_kernels.info import report

from .common import run_command
from .parser import Parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(
        prog,
        description="Versions, devices, environment variables, and every backend with the reasons why it cannot serve here.",
    )
    parser.parse_args(argv)
    return run_command(report)
