"""RESULTS.md and its plots, from the JSON files under results/: `python -m benchmarks report`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE / "RESULTS.md"


def table(results: dict[str, Any]) -> str:
    """Markdown. The limit is what the same run measured: the product or exp2 rate for attention, the copy rate for the other ops."""
    lines = ["| case | variant | ms (quartiles) | rate | of the limit | peak MiB |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        if "median" not in row:
            lines.append(f"| {row['case']} | {row['variant']} | {row['reason']} | | | |")
            continue
        shown = f"{row['rate'] / 1e12:.2f} TFLOP/s" if row["unit"] == "flops" else f"{row['rate'] / 1e9:.1f} GB/s"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        if "difference" in row:
            peak += f"; outputs differ by {row['difference']:.1e}"
        times = f"{row['median'] * 1e3:.3f} ({row['lower'] * 1e3:.3f} to {row['upper'] * 1e3:.3f})"
        lines.append(f"| {row['case']} | {row['variant']} | {times} | {shown} | {row['of_limit']:.0%} | {peak} |")
    return "\n".join(lines)


def machines() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Results by machine: (name, content) of each file."""
    found = defaultdict(list)
    for path in sorted(RESULTS.glob("*/*.json")):
        found[path.parent.name].append((path.stem, json.loads(path.read_text())))
    return dict(found)


def page() -> str:
    """RESULTS.md."""
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks report` from the files under `results/`; every number there was measured, by the command that is",
        "named with it. The limit is what the same run measured: the rate of matrix products, or of 2^x where that binds, for attention",
        "and models; of copies for the other ops. A row without a time says why.",
    ]
    for machine, files in machines().items():
        for name, results in files:
            made = results["provenance"]
            lines += ["", f"## {machine}: {name}", ""]
            versions = f"torch {made['torch']}, Triton {made['triton']}, Python {made['python']}"
            lines += [f"{made['device']}, {versions}, commit {made['commit']}, {made['date']}:"]
            lines += ["", f"    {made['command']}", ""]
            lines += [", ".join(f"{key} {value:.3g}/s" for key, value in results["limits"].items()), ""]
            lines += [f"![time by frames]({path.relative_to(HERE)})" for path in plots(machine, name, results)]
            lines += ["", table(results)]
    return "\n".join(lines) + "\n"


def plots(machine: str, name: str, results: dict[str, Any]) -> list[Path]:
    """The pictures that belong to a file: one per op, direction and dtype that was measured at two lengths or more."""
    return [
        RESULTS / machine / f"{name}-{group}.png" for group, rows in groups(results).items() if len({row["frames"] for row in rows}) > 1
    ]


def groups(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows with a time by op, direction and dtype, with their number of frames."""
    found = defaultdict(list)
    for row in results["rows"]:
        op, direction, shape, dtype = row["case"].split("-")
        if "median" in row:
            found[f"{op}-{direction}-{dtype}"].append(row | {"frames": int(shape.split("x")[0])})
    return dict(found)


def draw(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Milliseconds by frames with quartiles, and what the limit allows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), dpi=110)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["frames"])
        frames = [row["frames"] for row in own]
        line = axes.plot(frames, [row["median"] * 1e3 for row in own], marker="o", markersize=3, label=variant)[0]
        low, high = ([row[key] * 1e3 for row in own] for key in ("lower", "upper"))
        axes.fill_between(frames, low, high, color=line.get_color(), alpha=0.2)
    limit = {row["frames"]: row["median"] * row["of_limit"] * 1e3 for row in rows}
    axes.plot(sorted(limit), [limit[frames] for frames in sorted(limit)], "k--", linewidth=1, label="limit")
    axes.set(xscale="log", yscale="log", xlabel="frames of 336 x 518", ylabel="milliseconds", title=title)
    axes.set_xticks(sorted(limit), [str(frames) for frames in sorted(limit)])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def write() -> Path:
    """Make everything anew; the page."""
    for machine, files in machines().items():
        for name, results in files:
            found = groups(results)
            for path in plots(machine, name, results):
                group = path.stem.removeprefix(f"{name}-")
                draw(path, group.replace("-", ", "), found[group])
    PAGE.write_text(page())
    return PAGE
