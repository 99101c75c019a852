"""The command line: `python -m benchmarks list`, `run` or `report`, also as `page4d bench ...`. `--help` lists the options."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from page4d.cli.parser import Parser, interruptible
from page4d_kernels.profiling import peak_bytes, reset_peak
from page4d_kernels.timing import interleaved

from . import ranks, report
from .cases import QUICK, Case, cases, gate, make_inputs, prepare, variants
from .measure import CHECKOUT, limits, provenance, startup
from .model import MODELS, OUTPUTS, ours
from .official import CLASS, NAME, Official, OfficialError

LONGEST = 120.0  # seconds; a call that takes longer even at the peak rate is skipped


def measure(
    case: Case, device: str, seconds: float, limits: dict[str, float], official: tuple[Path, str] | None = None
) -> list[dict[str, Any]]:
    """One row per variant: its times, or the reason why it has none. `official`: the folder of a clone and its model class."""
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    ceilings = case.ceilings(limits)
    unit, amount = max(case.work().items(), key=lambda part: part[1] / ceilings[part[0]])  # the bottleneck
    least_seconds = amount / ceilings[unit]
    for variant in variants(case, device):
        row: dict[str, Any] = {"case": case.name, "variant": variant.name, "biased": variant.biased}
        rows.append(row)
        if least_seconds > LONGEST:
            row["reason"] = f"skipped: at the peak rate of this machine a call takes {least_seconds:.0f} s"
            continue
        try:
            verdict = gate(case, variant, make_inputs(case, device, small=True))
            row |= dataclasses.asdict(verdict)
            if not row["reason"]:
                run = prepare(case, variant, make_inputs(case, device))
                run()  # warms up, and fails here if the full size needs too much memory
                runs[variant.name] = run
        except RuntimeError as error:  # unsupported, out of memory or not compilable: go on with the next variant
            row["reason"] = str(error).strip().splitlines()[0]
    with contextlib.ExitStack() as stack:
        if official is not None and case.op == "model" and least_seconds <= LONGEST:
            rows.append(_official_row(case, official, make_inputs(case, device), runs, stack))
        try:
            timings = interleaved(runs, device, seconds) if runs else {}
        except OfficialError as error:  # the clone's process ended: time the other variants without it
            rows[-1]["reason"] = str(error)
            timings = interleaved({name: run for name, run in runs.items() if name != NAME}, device, seconds)
    for row in rows:
        if row["variant"] in timings:
            timing = timings[row["variant"]]
            row |= dataclasses.asdict(timing)
            if "official_peak" in row:
                row["peak_bytes"] = row.pop("official_peak")
            elif timing.peak_bytes is None and case.op in OUTPUTS:
                row["peak_bytes"] = resident_peak(case, row["variant"])
            rate = amount / timing.median
            row |= {"unit": unit, "rate": rate, "of_limit": rate / ceilings[unit]}
    return rows


def _official_row(
    case: Case, official: tuple[Path, str], inputs: Any, runs: dict[str, Callable[[], Any]], stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Add the user's clone to `runs`. The row holds the difference between its outputs and ours, relative to our norm."""
    row: dict[str, Any] = {"case": case.name, "variant": NAME, "biased": True}
    try:
        process = stack.enter_context(Official(*official, inputs))
    except OfficialError as error:
        return row | {"reason": str(error)}
    try:
        exact = ours(inputs).cpu()
    except RuntimeError as error:
        return row | {"reason": f"no outputs to compare with: {str(error).strip().splitlines()[0]}"}
    runs[NAME] = process
    difference = float((process.outputs - exact).norm() / exact.norm())
    return row | {"reason": "", "official_peak": process.peak, "difference": difference}


def resident_peak(case: Case, variant: str) -> int | None:
    """The peak resident memory of a new process that makes inputs and weights and calls the variant once. None if it fails."""
    command = [sys.executable, "-m", "benchmarks", "peak", case.name, variant]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    return int(result.stdout) if result.returncode == 0 else None


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog, description="Speed and memory of the kernels and the model against their baselines.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write RESULTS.md and the plots from the committed result files")
    commands.add_parser("list", help="list the cases, and their variants on this machine")
    run = commands.add_parser("run", help="measure")
    run.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="names from `list`, with wildcards (default: all)")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    run.add_argument("--seconds", type=float, default=2.0, help="time spent on each case (default: 2)")
    run.add_argument("--quick", action="store_true", help="measure only two small cases, to see the output format")
    run.add_argument("--official", type=Path, metavar="CLONE", help="also time a clone of the official release, in the cases `model-*`")
    run.add_argument("--official-class", default=CLASS, metavar="MODULE:CLASS", help=f"the model class in the clone (default: {CLASS})")
    run.add_argument("--ranks", type=int, metavar="N", help="one sequence on N processes against one, instead of the cases of `list`")
    run.add_argument("--out", type=Path, metavar="FILE.json", help="write the results to this file")
    peak = commands.add_parser("peak", help="print the peak resident memory in bytes of one call of a variant on the CPU")
    peak.add_argument("case")
    peak.add_argument("variant")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    return interruptible(lambda: _main(argv, prog))


def _main(argv: Sequence[str] | None, prog: str | None) -> int:
    prog = prog or "python -m benchmarks"
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(prog).parse_args(argv)
    if args.command == "report":
        print(f"wrote {report.write()}")
        return 0
    if args.command == "list":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print("\n".join(f"{case.name}: {', '.join(variant.name for variant in variants(case, device))}" for case in cases()))
        return 0
    if args.command == "peak":
        known = {case.name: [variant.name for variant in variants(case, "cpu")] for case in cases()}
        if args.variant not in known.get(args.case, []):
            print(f"error: {args.case} {args.variant} is no case with its variant: see `{prog} list`", file=sys.stderr)
            return 2
        print(_own_peak(args.case, args.variant))
        return 0
    return _run(args, prog, " ".join([prog, *argv]))


def _run(args: argparse.Namespace, prog: str, command: str) -> int:
    if args.ranks is not None:
        return _run_ranks(args, prog, command)
    chosen = QUICK if args.quick else [case for case in cases() if any(fnmatch.fnmatch(case.name, p) for p in args.cases)]
    if not chosen:
        print(f"error: no case matches {' '.join(args.cases)}: see `{prog} list`", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: this machine has no CUDA device: omit --device cuda", file=sys.stderr)
        return 2
    if args.official is not None and not args.official.is_dir():
        print(f"error: --official {args.official}: there is no such folder", file=sys.stderr)
        return 2
    official = None if args.official is None else (args.official.resolve(), args.official_class)
    results: dict[str, Any] = {"provenance": provenance(args.device, command), "limits": limits(args.device), "startup": startup()}
    results["rows"] = []
    try:
        for case in chosen:
            torch.compiler.reset()  # FlexAttention compiles for every shape and stops after eight
            results["rows"] += measure(case, args.device, args.seconds, results["limits"], official)
            if args.out:
                save(results, args.out)  # after every case, so that a run that is cut off keeps its results
            if args.device == "cuda":
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print(report.table(results))
        raise
    print(report.table(results))
    return 0


def _run_ranks(args: argparse.Namespace, prog: str, command: str) -> int:
    devices = torch.cuda.device_count() if args.device == "cuda" else args.ranks
    if not 2 <= args.ranks <= devices:
        have = f"2 to {devices} GPUs" if args.device == "cuda" and devices > 1 else "at least 2 processes, and a GPU for each on cuda"
        print(f"error: --ranks {args.ranks}: it needs {have}", file=sys.stderr)
        return 2
    names = [name for name in (ranks.CASES if args.device == "cuda" else ranks.ON_CPU) if any(fnmatch.fnmatch(name, p) for p in args.cases)]
    if not names:
        print(f"error: no case matches {' '.join(args.cases)}: choose from {', '.join(ranks.CASES)}", file=sys.stderr)
        return 2
    rows = ranks.run(args.ranks, args.device, args.seconds, names[: 1 if args.quick else None])
    results = {"provenance": provenance(args.device, command), "ranks": args.ranks, "rows": rows}
    if args.out:
        save(results, args.out)
    print(ranks.table(results))
    return 0


def _own_peak(case_name: str, variant_name: str) -> int:
    """The peak memory of this process after one call on the CPU. The inputs and weights count too."""
    case = next(case for case in cases() if case.name == case_name)
    variant = next(variant for variant in variants(case, "cpu") if variant.name == variant_name)
    inputs, cpu = make_inputs(case, "cpu"), torch.device("cpu")
    call = prepare(case, variant, inputs)
    if case.op in OUTPUTS:
        MODELS[variant_name](inputs)  # makes the weights before the measurement starts: they are in fp32 first
    reset_peak(cpu)
    call()
    return peak_bytes(cpu)


if __name__ == "__main__":
    sys.exit(main())
