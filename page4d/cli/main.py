"""`page4d COMMAND ...`: finds the command and hands its arguments on. A command's module is imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from .parser import Parser, first_speaks, interruptible, launched

COMMANDS = {  # each is a module of this package with `main(argv, prog)`
    "infer": "cameras, depth, points, tracks and the dynamics mask of a video",
    "view": "look at a reconstruction over time, in the browser",
    "info": "versions, devices, and every backend with the reasons why it cannot serve here",
    "qualify": "judge the backends on this machine, so that auto takes the fastest that are right",
    "bench": "measure speed and memory of the kernels and the model",
    "train": "train or fine-tune a model on synthetic scenes",
    "eval": "metrics against ground truth",
    "preview": "look at the synthetic training scenes",
}


SHARED = ("infer", "train")  # among several processes


def build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="page4d",
        usage="page4d [--help] [--version] COMMAND ...",
        description=f"PAGE-4D: cameras, depth, points, tracks and a dynamics mask from video.\n\ncommands:\n{listing}",
        epilog="`page4d COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"page4d {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS, metavar="COMMAND")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in COMMANDS else ("", [])
    if not name:
        parser = build_parser()
        wrong = parser.parse_args(arguments[:1]).command
        problem = f"unknown command {wrong!r}: choose" if wrong else "no command: give"
        parser.error(f"{problem} one of {', '.join(COMMANDS)} (a video goes to `page4d infer VIDEO`)")

    if name not in SHARED and launched() is not None:
        with first_speaks():
            build_parser().error(f"`page4d {name}` runs in one process: start it without torchrun")

    def run() -> int:
        return importlib.import_module(f".{name}", __package__).main(rest, prog=f"page4d {name}")

    return interruptible(run)


if __name__ == "__main__":
    sys.exit(main())
