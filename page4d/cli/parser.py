"""The argument parser of all commands, and how they end: no usage, no traceback, any console."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from ..errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint about wrong arguments is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        accept_all_names()
        print(f"error: {UserError(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def accept_all_names() -> None:
    """From now on print characters that the console cannot encode, such as those of file names, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def interruptible(run: Callable[[], int]) -> int:
    """The exit code of `run`. Neither Ctrl-C nor a reader of the output that has gone leaves a traceback."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # such as `page4d bench list | head -1`
        forget_output()
        return 0


def launched() -> tuple[int, int] | None:
    """Rank and number of the processes that `torchrun` started. None for one process."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(size)) if rank.isdecimal() and size.isdecimal() and int(size) > 1 else None


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
    """Around what all processes would say alike: only rank 0 says it."""
    there = launched()
    if there is None or there[0] == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def forget_output() -> None:
    """Send standard output nowhere: its reader has gone, and Python flushes once more at exit."""
    with contextlib.suppress(OSError, ValueError):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
