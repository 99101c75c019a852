"""Results as a Markdown table and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..files import AtomicFiles

HEADLINES = {  # the metrics of each task in the table; the JSON has all
    "pose": {"ate": "ATE", "ate_constant": "ATE still", "rpe_trans": "RPE t", "rpe_rot": "RPE r °"},
    "depth": {"abs_rel": "AbsRel", "delta1": "δ<1.25"},
    "mono": {"abs_rel": "AbsRel", "delta1": "δ<1.25"},
    "points": {"accuracy": "acc", "completeness": "comp"},
    "tracks": {"delta_avg": "δ avg", "occlusion_accuracy": "OA", "average_jaccard": "AJ"},
    "attention": {"deviation": "deviation"},
    "chunks": {"abs_rel": "AbsRel", "loops": "loops"},
    "mask": {"auc": "AUC", "iou": "IoU", "best_iou": "IoU best"},
}


def table(results: dict[str, dict]) -> str:
    """A Markdown table of the results of `evaluate` by dataset name: one row per sequence, one per mean, and a note on failures below."""
    groups = dict.fromkeys(group for result in results.values() for group in result["mean"])
    columns = [(group, metric, title) for group in groups for metric, title in HEADLINES[group.partition(":")[0]].items()]
    titles = ["sequence", *(f"{group} {title}" for group, _, title in columns)]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * len(columns)]
    for name, result in results.items():
        rows = [(sequence["name"], sequence["metrics"]) for sequence in result["sequences"]]
        for row, metrics in [*rows, (f"**mean of {name}**", result["mean"])]:
            cells = [_number(metrics.get(group, {}).get(metric, math.nan)) for group, metric, _ in columns]
            lines.append(f"| {' | '.join([row, *cells])} |")
    for name, result in results.items():
        if result["failed"]:
            share = f"{result['failed']} of {len(result['sequences'])} sequences of {name} failed"
            lines.append(f"\n**{share}**: outputs that are not finite, or depth that cannot be aligned, are not in the means.")
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON to `path` atomically. Numbers that are not finite become null."""
    with AtomicFiles() as files:
        files.add(path).write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
