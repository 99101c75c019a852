"""`page4d COMMAND ...`: finds the command and hands its arguments on. A command's module is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__

COMMANDS = {  # each is a module of this package with `main(argv, prog)`
    "infer": "cameras, depth, points, tracks and the dynamics mask of a video",
    "info": "versions, devices, and every backend with the reasons why it cannot serve here",
    "bench": "measure speed and memory of the kernels and the model",
    "train": "train or fine-tune a model on synthetic scenes",
    "eval": "metrics against ground truth",
    "preview": "look at the synthetic training scenes",
}


def build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="page4d",
        usage="page4d [--help] [--version] COMMAND ...",
        description=f"PAGE-4D: cameras, depth, points, tracks and a dynamics mask from video.\n\ncommands:\n{listing}",
        epilog="`page4d COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"page4d {__version__}")
    parser.add_argument("command", help=argparse.SUPPRESS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command not in COMMANDS:
        parser.error(f"unknown command {args.command!r}: choose one of {', '.join(COMMANDS)} (a video goes to `page4d infer VIDEO`)")
    command = importlib.import_module(f".{args.command}", __package__)
    return command.main(args.arguments, prog=f"page4d {args.command}")


if __name__ == "__main__":
    sys.exit(main())
