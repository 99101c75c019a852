"""`python -m page4d_kernels.qualify`, the same as `page4d qualify`: judge the backends on this machine and write the record."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from ..backends.registry import BackendError
from . import record
from .classes import DTYPES, FORWARD, TRAINING
from .errors import QualifyError
from .record import Entry
from .report import describe
from .run import Job, Watch, done, jobs, qualify

SECONDS = {"cuda": 60.0, "cpu": 15.0}  # of the run that `page4d infer` starts by itself
BY_HAND = {"cuda": 600.0, "cpu": 120.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op; may be given several times (default: all)")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="only this one, also one that auto never takes; may be given several times"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--dtypes", metavar="NAMES", help="such as float32,bfloat16 (default: all that a backend serves)")
    parser.add_argument("--head-dims", default="64", metavar="NUMBERS", help="such as 64,128 (default: 64, of all published weights)")
    parser.add_argument("--forward-only", action="store_true", help="leave training out")
    parser.add_argument("--force", action="store_true", help="judge again what the record already holds")
    parser.add_argument("--seconds", type=float, help="stop after about this many (default: 600 on a GPU, 120 on a CPU)")
    parser.add_argument("--seed", type=int, help="of the random lengths, to repeat a run (default: drawn)")
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="where a backend of yours registers"
    )


def run(args: argparse.Namespace, more: Sequence[Job] = ()) -> str:
    """Judge by the options, save, and return the report.

    Args:
        more: jobs that are no backends of an op, for a GPU. They are judged with all others, if neither --op nor --backend is given.

    Raises:
        QualifyError, BackendError: in one line.
    """
    record.mode()
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise QualifyError("there is no CUDA device here: use --device cpu")
    if args.seconds is not None and not 1 <= args.seconds <= 86400:
        raise QualifyError(f"--seconds must be from 1 to 86400, not {args.seconds:g}")
    dtypes = _names("--dtypes", args.dtypes, ["bfloat16", "float16", "float32"] if kind == "cuda" else ["float32", "bfloat16", "float16"])
    texts = args.head_dims.split(",")
    head_dims = list(dict.fromkeys(int(x) for x in texts if x.strip().isdecimal()))
    if not all(x.strip().isdecimal() for x in texts) or min(head_dims) < 1:
        raise QualifyError(f"--head-dims {args.head_dims}: give numbers separated by commas, such as 64,128")
    if args.modules:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    for module in args.modules:
        try:
            __import__(module)
        except Exception as error:  # its own, or there is no such module
            kind_of_error = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            hint = ": give a module's name, without .py" if module.endswith(".py") else ""
            raise QualifyError(f"--import {module}: {kind_of_error}{error}{hint}") from None
    device = torch.device(kind)
    todo = jobs(device, list(dict.fromkeys(args.op or ())), list(dict.fromkeys(args.backend or ())), args.modules)
    if kind == "cuda" and not args.op and not args.backend:
        todo += more
    if not todo:
        return "there is nothing to judge here: beside PyTorch's own, no backend can serve on this machine (see `page4d info`)"
    directions = [FORWARD] if args.forward_only else [FORWARD, TRAINING]
    with record.only_one(device) as alone:
        if not alone:
            raise QualifyError("another process is judging the backends of this device: wait until it has ended")
        known = None if args.force else record.stored(device)[0]
        # a backend from outside is judged each time: the record does not know whether its code has changed
        todo = [job for job in todo if known is None or job.modules or not done(known, job, dtypes, directions, head_dims)]
        if known is not None and not todo:
            return describe(known, args.op) + "\nall of this is in the record: --force judges it again"
        saving, seconds = Saving(device), args.seconds or BY_HAND[kind]
        announce(len(todo), seconds)
        try:
            with progress_bar(todo) as watch:
                entry, missed = qualify(
                    device, todo, seconds, dtypes=dtypes, directions=directions, head_dims=head_dims, seed=args.seed, known=known,
                    keep=saving, watch=watch,
                )  # fmt: skip
        except KeyboardInterrupt:
            print(f"{saving.words or 'nothing was judged yet'}: the next run goes on from here", file=sys.stderr)
            raise
        if entry.ops and not args.op and not args.backend:
            saving(Entry(entry.environment, entry.made, tried=[f"{dtype} {way}" for dtype in dtypes for way in directions]))
    lines = [saving.words or "nothing was judged, and nothing saved"]
    lines += [f"{name}: {what}" for name, words in missed.items() for what in words]
    if missed and saving.words:
        lines.append("run it again to go on from here, or with more --seconds")
    if record.mode() == "off":
        lines.append("PAGE4D_QUALIFY=off is set: auto does not follow the record")
    return "\n".join([describe(record.stored(device)[0] or entry, args.op), *lines])


def announce(backends: int, seconds: float) -> None:
    """Say what will take a while, and whether the times will be wrong."""
    print(f"kernels: {backends} backends are judged, which takes up to {seconds:g} s", file=sys.stderr)
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.75 * (os.cpu_count() or 1):
        print(
            f"kernels: this machine is busy (load {busy:.1f}), times may be wrong: `page4d qualify --force` measures again",
            file=sys.stderr,
        )


@contextlib.contextmanager
def progress_bar(todo: Sequence[Job]) -> Iterator[Watch]:
    """A progress bar that names what runs."""
    with tqdm(total=len(todo), desc="qualify kernels", unit="backend", disable=None) as bar:

        def watch(name: str, at: str) -> None:
            if at:
                bar.set_postfix_str(f"{name}: {at}")
            else:
                bar.update()

        yield watch


class Saving:
    """Saves entries, or keeps them for this process. `words` says what was done with the last."""

    def __init__(self, device: torch.device):
        self.device, self.words = device, ""

    def __call__(self, entry: Entry) -> None:
        if not entry.ops and not entry.tried:
            return
        try:
            self.words = f"saved in {record.save(self.device, entry)}"
        except QualifyError as error:
            record.keep_in_process(self.device, entry)
            self.words = f"{error}: this process follows it, the next will not"


def first_run(device: torch.device, dtype: torch.dtype) -> str:
    """What `page4d infer` does once per device, environment and dtype: judge what it will use. Returns lines for the user, or nothing."""
    if device.type not in SECONDS or record.mode() == "off":
        return ""
    part = f"{DTYPES[dtype]} {FORWARD}"
    known = record.stored(device)[0]
    if known is not None and part in known.tried:
        return ""
    if not record.writable(device):
        return f"kernels: they are not judged, as the record {record.path_of(device)} cannot be written; the documented order serves"
    with record.only_one(device) as alone:
        if not alone:
            return "kernels: another process is judging the backends; the documented order serves this run"
        todo, saving = jobs(device), Saving(device)
        announce(len(todo), SECONDS[device.type])
        with progress_bar(todo) as watch:
            entry, missed = qualify(device, todo, SECONDS[device.type], dtypes=[DTYPES[dtype]], known=known, keep=saving, watch=watch)
        saving(Entry(entry.environment, entry.made, tried=[part]))
    lines = [f"kernels: judged once on this machine, {saving.words}; `page4d info` shows it, PAGE4D_QUALIFY=off forbids it"]
    if missed:
        lines.append(f"kernels: not all of {', '.join(missed)} could be compared in that time: run `page4d qualify` to go on")
    return "\n".join(lines)


def _names(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(","))) if text is not None else list(known)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise QualifyError(f"{option} {text}: choose from {', '.join(known)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m page4d_kernels.qualify", description=__doc__.partition(": ")[2])
    add_options(parser)
    try:
        print(run(parser.parse_args(argv)))
    except (QualifyError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
