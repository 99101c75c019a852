"""What attention plans save at the official size, in time and by count: `python -m benchmarks.plan_time --frames 16,32`.

Random weights, the bf16 trunk with its camera head. Plans take turns, and the best time of each counts. The last column is the share of the
factor promised by the count that the time keeps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from page4d.execution.attention_plan import CHECKED_ROWS, PRESETS, AttentionPlan, Layer
from page4d_kernels import TokenLayout, thin_attention
from page4d_kernels.timing import Clock

from .formulas import trunk_flops
from .measure import provenance
from .model import make_inputs, our_model
from .sizes import GRID, PER_FRAME, SIZE, SPECIAL

COMMAND = "python -m benchmarks.plan_time"


def best_of(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each, the least of some rounds in which they take turns."""
    clock = Clock(device)
    rows = [{name: clock.seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    return {name: min(row[name] for row in rows) for name in runs}


def trunk(frames: int, rounds: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each preset."""
    inputs = make_inputs("trunk", frames, dtype, device, small=False)
    model = our_model(inputs)
    plans = {name: AttentionPlan.preset(name, model.config) for name in PRESETS}

    def run(plan: AttentionPlan) -> Callable[[], object]:
        return lambda: model(inputs.images, outputs=["camera"], attention=plan)

    with torch.inference_mode():
        seconds = best_of({name: run(plan) for name, plan in plans.items()}, rounds, device)
    flops = {name: sum(trunk_flops(model.config, frames, SIZE, plan).values()) for name, plan in plans.items()}
    rows = []
    for name in plans:
        by_time, by_count = seconds["exact"] / seconds[name], flops["exact"] / flops[name]
        row = {"frames": frames, "plan": name, "seconds": seconds[name], "factor": by_time, "factor by count": by_count}
        rows.append(row | {"kept": by_time / by_count})
    return rows


def check(frames: int, rounds: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the attention of a layer with cells of 2 x 2, and of the rows that measure its deviation."""
    layout = TokenLayout(frames, PER_FRAME, SPECIAL)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 16, layout.tokens, 64, generator=generator).to(device, dtype) for _ in range(3))
    layer: Layer = (2, 2)
    sparse = AttentionPlan((layer,)).sparsity(0, layout, GRID, CHECKED_ROWS, q.device)
    assert sparse is not None and sparse.keys is not None
    keys, out = sparse.keys, torch.empty_like(q)
    with torch.inference_mode():
        runs: dict[str, Callable[[], object]] = {
            "layer": lambda: thin_attention(q, k, v, keys),
            "check": lambda: sparse.deviation(out, q, k, v, None),
        }
        return best_of(runs, rounds + 1, device)  # the first round warms up


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", default="16,32", help="numbers of frames (default: 16,32)")
    parser.add_argument("--rounds", type=int, default=2, help="how often each plan runs (default: 2)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    numbers = [int(part) if part.isdecimal() else 0 for part in args.frames.split(",")]
    if min(numbers) < 2:
        parser.error(f"--frames {args.frames}: give numbers of at least 2, with a single frame there is nothing to save")
    rows: list[dict[str, Any]] = []
    print("| frames | plan | seconds | factor | by count | kept |\n|---:|---|---:|---:|---:|---:|")
    for frames in numbers:
        measured = trunk(frames, args.rounds, args.device, torch.bfloat16)
        rows += measured
        for row in measured:
            factors = f"{row['factor']:.2f} | {row['factor by count']:.2f} | {row['kept']:.0%}"
            print(f"| {frames} | `{row['plan']}` | {row['seconds']:.1f} | {factors} |", flush=True)
        cost = check(frames, args.rounds, args.device, torch.bfloat16)
        rows.append({"frames": frames} | cost)
        print(
            f"{frames} frames, cells of 2 x 2: the check takes {cost['check'] / cost['layer']:.2%} of the attention of a layer", flush=True
        )
    if args.json is not None:
        args.json.write_text(json.dumps({**provenance(args.device, COMMAND), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
