"""`page4d qualify`: judge the backends of every op on this machine, so that auto takes the fastest that are right."""

from __future__ import annotations

from collections.abc import Sequence

from page4d_kernels.qualify.__main__ import add_options, run

from ..model import graph_worker
from .common import run_command
from .parser import Parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = Parser(prog, description="Judge every backend on this machine and write the record that auto follows (docs/qualification.md).")
    add_options(parser)
    args = parser.parse_args(argv)
    return run_command(lambda: run(args, [graph_worker.JOB]))
