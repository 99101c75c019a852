"""Shared by the commands: option types, and user errors as one line with an exit code."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from page4d_kernels import BackendError
from page4d_kernels.env import VariableError
from page4d_kernels.qualify.errors import QualifyError

from ..errors import UserError
from ..execution.memory import is_out_of_memory
from .parser import accept_all_names, forget_output

PLAN_HELP = "what patches see in global attention: exact, balanced, fast, a cell such as 2x2, or a .json file (default: exact)"
CHUNK_HELP = "run long videos in chunks of N frames, a quarter of them in common unless given; off = never (default: where needed)"
WEIGHTS_HELP = "nano (bundled, the default), page4d, page4d-mask or vggt (Hugging Face hub), a .pt or .safetensors file, or random[:PRESET]"


def say(text: str) -> None:
    """Print progress messages to standard error. Standard output is for the report alone."""
    print(text, file=sys.stderr)


def parse_size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(side) for side in text.lower().split("x")]
        return sides[0] if len(sides) == 1 else (sides[0], sides[1]) if len(sides) == 2 else int("")
    except ValueError:
        shown = text if len(text) < 40 else f"{text[:20]}... ({len(text)} characters)"
        raise argparse.ArgumentTypeError(f"{shown!r} is not a size: give a width such as 518, or HEIGHTxWIDTH such as 336x518") from None


def parse_bytes(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        size = int(float(number) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory: give bytes, or a number with K, M or G such as 6G")
    return size


def parse_folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give the name of a folder")
    return Path(text)


def parse_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def run_command(run: Callable[[], str | None], save_memory: str = "use fewer --frames or a smaller --size") -> int:
    """Print the report that `run` returns, if any, and return the exit code. A user's mistake is one line, never a traceback."""
    accept_all_names()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        report = run()
    except (UserError, BackendError, QualifyError, VariableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        detail = (str(error).splitlines() or [""])[0]
        print(f"error: out of memory: {save_memory} ({detail})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    try:
        if report is not None:
            print(report, flush=True)
    except BrokenPipeError:  # the reader has gone, but the files are written
        forget_output()
    except OSError as error:
        print(f"error: the report cannot be printed ({error.strerror}), but the work is done", file=sys.stderr)
        return 1
    return 0
