"""`python -m benchmarks list` and `python -m benchmarks run [--cases PATTERN ...] [--device cuda] [--seconds 2] [--out FILE.json]`."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from .cases import QUICK, Case, cases, gate, inputs, prepare, variants
from .measure import interleaved, limits, provenance


def measure(case: Case, device: str, seconds: float, limits: dict[str, float]) -> list[dict[str, Any]]:
    """One row per variant: times, or why there are none."""
    rows: list[dict[str, Any]] = []
    runs = {}
    for variant in variants(case, device):
        row: dict[str, Any] = {"case": case.name, "variant": variant.name, "biased": variant.biased}
        rows.append(row)
        try:
            row["reason"] = gate(case, variant, inputs(case, device, small=True))
            if not row["reason"]:
                runs[variant.name] = prepare(case, variant, inputs(case, device))
        except RuntimeError as error:  # it cannot serve this, has no memory, does not compile: the others are measured all the same
            row["reason"] = str(error).strip().splitlines()[0]
    timings = interleaved(runs, device, seconds) if runs else {}
    for row in rows:
        if row["variant"] in timings:
            timing = timings[row["variant"]]
            row |= dataclasses.asdict(timing)
            (unit, amount), ceilings = next(iter(case.work().items())), case.ceilings(limits)
            rate = amount / timing.median
            row |= {"unit": unit, "rate": rate, "of_limit": rate / ceilings[unit]}
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown. The limit is what the same run measured: the product or exp2 rate for attention, the copy rate for the other ops."""
    lines = ["| case | variant | ms (quartiles) | rate | of the limit | peak MiB |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        if "median" not in row:
            lines.append(f"| {row['case']} | {row['variant']} | {row['reason']} | | | |")
            continue
        shown = f"{row['rate'] / 1e12:.2f} TFLOP/s" if row["unit"] == "flops" else f"{row['rate'] / 1e9:.1f} GB/s"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        times = f"{row['median'] * 1e3:.3f} ({row['lower'] * 1e3:.3f} to {row['upper'] * 1e3:.3f})"
        lines.append(f"| {row['case']} | {row['variant']} | {times} | {shown} | {row['of_limit']:.0%} | {peak} |")
    return "\n".join(lines)


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Speed and memory of the kernels against their baselines.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the cases and, for this machine, their variants")
    run = commands.add_parser("run", help="measure")
    run.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="names as in `list`, with wildcards")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    run.add_argument("--seconds", type=float, default=2.0, help="of timing per case (default 2)")
    run.add_argument("--quick", action="store_true", help="two small cases, for a look at the format")
    run.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args(arguments)
    every = cases()
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
    results: dict[str, Any] = {"provenance": provenance(options.device), "limits": limits(options.device), "rows": []}
    for case in chosen:
        torch.compiler.reset()  # FlexAttention compiles for every shape, and gives up after eight
        results["rows"] += measure(case, options.device, options.seconds, results["limits"])
        if options.out:
            save(results, options.out)  # after every case: a run that is cut off keeps what it has
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
