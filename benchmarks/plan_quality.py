"""What attention plans cost nano in quality, on rendered scenes: `python -m benchmarks.plan_quality --frames 8 --seeds 100,101,102`.

Every plan sees the same sequences. The table has the mean of exact attention, and for each plan the difference to it in percent, with the
standard error of the paired differences. The deviation is the mean over sequences, by layer. "warns" is the rank correlation, over
sequences, of the largest deviation with the change of the ATE in either direction.

Plans: all that `page4d eval --attention` takes, and `general balanced`, `general fast` (not nano's own), KIND@L (one layer alone, such as
frame@0 or 3x3@4, the others exact), budget:RxC:rxc (cells of R x C, with whole ones where things move until as many keys are seen as with
r x c; control:... where the least moves), blocks:SHARE:FLOOR (block-sparse).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from page4d import Page4D
from page4d.config import DENSE, FRAME, Layer, Page4DConfig
from page4d.data.synthetic import SyntheticScenes
from page4d.errors import InputError
from page4d.evaluation.evaluate import sequence_metrics
from page4d.evaluation.protocol import Protocol
from page4d.evaluation.readers import Rules
from page4d.execution.attention_plan import AttentionPlan

from .measure import provenance
from .plan_variants import BlockPlan, BudgetPlan

COMMAND = "python -m benchmarks.plan_quality"
SIZE = (56, 84)
COLUMNS = {"ATE": ("pose", "ate"), "RPE t": ("pose", "rpe_trans"), "RPE r, °": ("pose", "rpe_rot"),
           "AbsRel": ("depth:median", "abs_rel"), "mask AUC": ("mask", "auc")}  # fmt: skip
USUAL = "exact,1x2,2x2,2x3,3x3,balanced,fast,general balanced,general fast"


def parse_plan(name: str, config: Page4DConfig) -> AttentionPlan:
    """The plan that a name stands for, see above. InputError if it stands for none."""
    try:
        return _special(name, config) or AttentionPlan.of(name, config)
    except (ValueError, IndexError) as error:
        raise InputError(f"--plans: {name!r} ({error})") from None


def _special(name: str, config: Page4DConfig) -> AttentionPlan | None:
    """Plans that have a name here alone."""
    kind, _, rest = name.partition(":")
    if kind in ("budget", "control"):
        coarse, fine = (_cell(part) for part in rest.split(":"))
        if math.prod(coarse) <= math.prod(fine):
            raise ValueError("the second cell must be smaller than the first")
        return BudgetPlan((coarse,) * config.depth, name, like=fine, inverted=kind == "control")
    if kind == "blocks":
        share, floor = map(float, rest.split(":"))
        return BlockPlan((DENSE,) * config.depth, name, share=share, floor=floor)
    if "@" in name:
        layer, _, number = name.partition("@")
        layers: list[Layer] = [DENSE] * config.depth
        layers[int(number)] = FRAME if layer == FRAME else _cell(layer)
        return AttentionPlan(tuple(layers), name)
    return AttentionPlan.general(name.removeprefix("general "), config.depth) if name.startswith("general ") else None


def _cell(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split("x"))
    return rows, columns


def measure(model: Page4D, plans: dict[str, AttentionPlan], scenes: Sequence[SyntheticScenes]) -> dict[str, list[dict[str, float]]]:
    """By plan a row for each sequence: the metrics of COLUMNS, and the deviation of each layer."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    samples = (dataset[index] for dataset in scenes for index in range(len(dataset)))
    for sample in tqdm(samples, total=sum(map(len, scenes)), unit="sequence"):
        for name, plan in plans.items():
            protocol = Protocol(SIZE, alignments=("median",), attention=plan)
            metrics, _ = sequence_metrics(model, sample, ["pose", "depth", "mask"], protocol, Rules())
            row = {title: metrics.get(group, {}).get(metric, math.nan) for title, (group, metric) in COLUMNS.items()}
            found[name].append(row | {key: value for key, value in metrics.get("attention", {}).items() if key != "deviation"})
    return found


def compared(values: list[float], exact: list[float]) -> tuple[float, float, float]:
    """The mean, and the mean and standard error of the paired differences to `exact` in percent of its mean. NaNs are left out."""
    pairs = [(x, y) for x, y in zip(values, exact, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not pairs:  # such as the mask where nothing moves
        return math.nan, math.nan, math.nan
    mean, base = (statistics.fmean(side) for side in zip(*pairs, strict=True))
    differences = [100 * (x - y) / base for x, y in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return mean, statistics.fmean(differences), error


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho of two lists without ties."""
    ranks = torch.tensor([list(x), list(y)], dtype=torch.float64).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def table(found: dict[str, list[dict[str, float]]], plans: dict[str, AttentionPlan]) -> str:
    """Markdown, see above."""
    lines = [f"| plan | {' | '.join(COLUMNS)} | deviation by layer | warns |", "|---|" + "---|" * (len(COLUMNS) + 2)]
    exact = found["exact"]
    for name, rows in found.items():
        cells = []
        for title in COLUMNS:
            mean, difference, error = compared([row[title] for row in rows], [row[title] for row in exact])
            cells.append("" if math.isnan(mean) else f"{mean:.4f}" if name == "exact" else f"{difference:+.1f} ± {error:.1f} %")
        layers = [key for key in rows[0] if key.startswith("layer ")]
        deviation = " ".join(f"{statistics.fmean(row[key] for row in rows):.2f}" for key in layers)
        warns = ""
        if layers:
            changes = [abs(row["ATE"] - other["ATE"]) for row, other in zip(rows, exact, strict=True)]
            warns = f"{rank_correlation([max(row[key] for key in layers) for row in rows], changes):+.2f}"
        plan = plans[name]
        computed = f", {statistics.fmean(plan.computed):.0%} of the pairs" if isinstance(plan, BlockPlan) else ""
        lines.append(f"| `{name}`{computed} | {' | '.join(cells)} | {deviation} | {warns} |")
    return "\n".join(lines)


BINS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, math.inf)  # of the largest deviation of a sequence


def warnings(found: dict[str, list[dict[str, float]]], plans: dict[str, AttentionPlan]) -> str:
    """Markdown: how far the ATE moves, in either direction, by the largest deviation. Of the plans that have cells in all layers."""
    cells = [name for name, plan in plans.items() if not plan.exact and all(isinstance(layer, tuple) for layer in plan.layers)]
    pairs = [
        (max(value for key, value in row.items() if key.startswith("layer ")), abs(row["ATE"] / exact["ATE"] - 1))
        for name in cells
        for row, exact in zip(found[name], found["exact"], strict=True)
        if exact["ATE"] > 0
    ]
    lines = ["| largest deviation | sequences | the ATE moves by (median) | by over 10 % in |", "|---|---|---|---|"]
    for low, high in itertools.pairwise(BINS):
        moved = [change for deviation, change in pairs if low <= deviation < high]
        if moved:
            share = statistics.fmean(change > 0.1 for change in moved)
            lines.append(f"| {low:g} to {high:g} | {len(moved)} | {statistics.median(moved):.1%} | {share:.0%} |")
    return "\n".join(lines) if pairs else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--kind", default="dynamic", choices=["static", "dynamic"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--seeds", default="100,101,102", help="of the scenes (default: 100,101,102)")
    parser.add_argument("--sequences", type=int, default=100, help="of each seed (default: 100)")
    parser.add_argument("--plans", default=USUAL, help=f"separated by commas (default: {USUAL})")
    parser.add_argument("--json", type=Path, help="write each sequence's values here")
    args = parser.parse_args(argv)
    model = Page4D.from_pretrained(args.weights, device="cpu").eval()
    if args.frames < 2 or args.sequences < 2:
        parser.error("--frames and --sequences must be at least 2")
    try:
        plans = {name: parse_plan(name, model.config) for name in dict.fromkeys(["exact", *args.plans.split(",")])}
    except InputError as error:
        parser.error(str(error))
    scenes = [
        SyntheticScenes(args.kind, frames=args.frames, size=SIZE, seed=int(seed), length=args.sequences) for seed in args.seeds.split(",")
    ]
    found = measure(model, plans, scenes)
    text = table(found, plans)
    print(f"{args.frames} frames, {args.kind}, seeds {args.seeds}, {args.sequences} sequences each\n\n{text}\n\n{warnings(found, plans)}")
    if args.json is not None:
        content: dict[str, Any] = {**provenance("cpu", COMMAND), "arguments": vars(args) | {"json": None}, "sequences": found}
        args.json.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
