"""`python -m benchmarks list`, `run [--cases PATTERN ...] [--device cuda] [--seconds 2] [--official CLONE] [--out FILE.json]`, `report`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from page4d_kernels.nvtx import peak_bytes, reset_peak

from . import report
from .cases import QUICK, Case, cases, gate, inputs, prepare, variants
from .measure import interleaved, limits, provenance, startup
from .model import MODELS, OUTPUTS, ours
from .official import CLASS, NAME, Official, OfficialError

LONGEST = 120.0  # seconds that a call may take at the limit's rate


def measure(
    case: Case, device: str, seconds: float, limits: dict[str, float], official: tuple[Path, str] | None = None
) -> list[dict[str, Any]]:
    """One row per variant: times, or why there are none. `official`: a clone and the model's class there, for the whole model."""
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    ceilings = case.ceilings(limits)
    unit, amount = max(case.work().items(), key=lambda part: part[1] / ceilings[part[0]])  # what binds it
    least = amount / ceilings[unit]
    for variant in variants(case, device):
        row: dict[str, Any] = {"case": case.name, "variant": variant.name, "biased": variant.biased}
        rows.append(row)
        if least > LONGEST:
            row["reason"] = f"left out: a call takes more than {least:.0f} s here"
            continue
        try:
            verdict = gate(case, variant, inputs(case, device, small=True))
            row |= dataclasses.asdict(verdict)
            if not row["reason"]:
                run = prepare(case, variant, inputs(case, device))
                run()  # warms up, and shows whether there is memory for the whole size
                runs[variant.name] = run
        except RuntimeError as error:  # it cannot serve this, has no memory, does not compile: the others are measured all the same
            row["reason"] = str(error).strip().splitlines()[0]
    with contextlib.ExitStack() as stack:
        if official is not None and case.op == "model" and least <= LONGEST:
            rows.append(_official_row(case, official, inputs(case, device), runs, stack))
        try:
            timings = interleaved(runs, device, seconds) if runs else {}
        except OfficialError as error:  # the clone ended while it was timed: the others again, without it
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
    case: Case, official: tuple[Path, str], given: Any, runs: dict[str, Callable[[], Any]], stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Adds the user's clone to what is timed; its row says how far its outputs are from ours, of their norm."""
    row: dict[str, Any] = {"case": case.name, "variant": NAME, "biased": True}
    try:
        process = stack.enter_context(Official(*official, given))
    except OfficialError as error:
        return row | {"reason": str(error)}
    try:
        exact = ours(given).cpu()
    except RuntimeError as error:
        return row | {"reason": f"nothing to compare it with: {str(error).strip().splitlines()[0]}"}
    runs[NAME] = process
    difference = float((process.outputs - exact).norm() / exact.norm())
    return row | {"reason": "", "official_peak": process.peak, "difference": difference}


def resident_peak(case: Case, variant: str) -> int | None:
    """The most memory that a process of its own holds that makes the inputs and weights and calls a variant once; None if it fails."""
    command = [sys.executable, "-m", "benchmarks", "peak", case.name, variant]
    result = subprocess.run(command, capture_output=True, text=True)
    return int(result.stdout) if result.returncode == 0 else None


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Speed and memory of the kernels against their baselines.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write RESULTS.md and the plots from the results that are committed")
    commands.add_parser("list", help="the cases and, for this machine, their variants")
    run = commands.add_parser("run", help="measure")
    run.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="names as in `list`, with wildcards")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    run.add_argument("--seconds", type=float, default=2.0, help="of timing per case (default 2)")
    run.add_argument("--quick", action="store_true", help="two small cases, for a look at the format")
    run.add_argument("--official", type=Path, metavar="CLONE", help="also time a clone of the official release, in the cases `model-*`")
    run.add_argument("--official-class", default=CLASS, metavar="MODULE:CLASS", help=f"the model in it (default {CLASS})")
    run.add_argument("--out", type=Path, help="write JSON here")
    peak = commands.add_parser("peak", help="resident memory in bytes of a process that calls one variant of a case once, on the CPU")
    peak.add_argument("case")
    peak.add_argument("variant")
    options = parser.parse_args(arguments)
    every = cases()
    if options.command == "report":
        print(f"wrote {report.write()}")
        return 0
    if options.command == "peak":
        case = next(case for case in every if case.name == options.case)
        given, cpu = inputs(case, "cpu"), torch.device("cpu")
        call = prepare(case, next(v for v in variants(case, "cpu") if v.name == options.variant), given)
        if case.op in OUTPUTS:
            MODELS[options.variant](given)  # makes the weights, in fp32 first
        reset_peak(cpu)
        call()
        print(peak_bytes(cpu))
        return 0
    if options.command == "list":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print("\n".join(f"{case.name}: {', '.join(variant.name for variant in variants(case, device))}" for case in every))
        return 0
    chosen = QUICK if options.quick else [case for case in every if any(fnmatch.fnmatch(case.name, p) for p in options.cases)]
    if not chosen:
        print(f"error: no case matches {' '.join(options.cases)}: see `python -m benchmarks list`", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no CUDA device here: leave out --device cuda", file=sys.stderr)
        return 2
    if options.official is not None and not options.official.is_dir():
        print(f"error: --official {options.official}: there is no such folder", file=sys.stderr)
        return 2
    official = None if options.official is None else (options.official.resolve(), options.official_class)
    results: dict[str, Any] = {"provenance": provenance(options.device), "limits": limits(options.device), "startup": startup(), "rows": []}
    for case in chosen:
        torch.compiler.reset()  # FlexAttention compiles for every shape, and gives up after eight
        results["rows"] += measure(case, options.device, options.seconds, results["limits"], official)
        if options.out:
            save(results, options.out)  # after every case: a run that is cut off keeps what it has
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(report.table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
