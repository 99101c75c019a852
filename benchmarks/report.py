"""RESULTS.md and its plots, from the JSON files under results/: `python -m benchmarks report`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from . import ranks

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE / "RESULTS.md"
README = HERE.parent / "README.md"
MARKS = "<!-- results -->\n", "<!-- end of results -->\n"  # `readme` writes the text between them
SHOWN = "epyc-2-cores", "kernels", "mask_attention-forward-bfloat16", ("cpu", "sdpa", "sdpa_augmented", "torch sdpa without mask")


def table(results: dict[str, Any]) -> str:
    """Markdown. The limit was measured in the same run: the matmul or exp2 rate for attention, the copy rate for the other ops."""
    lines = [
        "| case | variant | ms (quartiles) | rate | of the limit | peak MiB | error (of gated rows) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "median" not in row:
            lines.append(f"| {row['case']} | {row['variant']} | {row['reason']} | | | | |")
            continue
        shown = f"{row['rate'] / 1e12:.2f} TFLOP/s" if row["unit"] == "flops" else f"{row['rate'] / 1e9:.1f} GB/s"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        times = f"{row['median'] * 1e3:.3f} ({row['lower'] * 1e3:.3f} to {row['upper'] * 1e3:.3f})"
        lines.append(f"| {row['case']} | {row['variant']} | {times} | {shown} | {row['of_limit']:.0%} | {peak} | {_errors(row)} |")
    return "\n".join(lines)


def _errors(row: dict[str, Any]) -> str:
    """Relative to the norm: against float64, or for the official release against our outputs."""
    if "difference" in row:
        return f"{row['difference']:.1e} from ours"
    if row.get("error") is None:
        return ""
    return f"{row['error']:.1e}" + (f" ({row['gated_error']:.1e})" if row.get("gated_error") is not None else "")


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
            if "startup" in results:
                lines += ["Starting: " + ", ".join(f"{what} {value:.2f} s" for what, value in results["startup"].items()), ""]
            if "ranks" in results:
                lines += [ranks.table(results)]
                continue
            lines += [", ".join(f"{key} {value:.3g}/s" for key, value in results["limits"].items()), ""]
            lines += [f"![by frames]({path.relative_to(HERE)})" for path in plots(machine, name, results)]
            lines += ["", table(results)]
    return "\n".join(lines) + "\n"


def plots(machine: str, name: str, results: dict[str, Any]) -> list[Path]:
    """The plots of a file: one for each op, direction and dtype that was measured at two lengths or more."""
    return [
        RESULTS / machine / f"{name}-{group}.png" for group, rows in groups(results).items() if len({row["frames"] for row in rows}) > 1
    ]


def groups(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows that have a time, grouped by op, direction and dtype; each row gets its number of frames."""
    found = defaultdict(list)
    for row in results["rows"]:
        op, direction, shape, dtype = row["case"].split("-")
        if "median" in row:
            found[f"{op}-{direction}-{dtype}"].append(row | {"frames": int(shape.split("x")[0])})
    return dict(found)


def draw(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Plot time with quartiles, rate, and memory if it was measured, against frames. The dashed line is the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    flops = rows[0]["unit"] == "flops"
    panels = [("milliseconds", "median", 1e3), ("TFLOP/s" if flops else "GB/s", "rate", 1e-12 if flops else 1e-9)]
    if any(row["peak_bytes"] for row in rows):
        panels.append(("peak MiB", "peak_bytes", 2.0**-20))
    figure, every = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), dpi=100)
    ticks = sorted({row["frames"] for row in rows})
    for axes, (label, key, unit) in zip(every, panels, strict=True):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            own = sorted((row for row in rows if row["variant"] == variant and row[key]), key=lambda row: row["frames"])
            frames = [row["frames"] for row in own]
            line = axes.plot(frames, [row[key] * unit for row in own], marker="o", markersize=3, label=variant)[0]
            if key == "median":
                low, high = ([row[bound] * unit for row in own] for bound in ("lower", "upper"))
                axes.fill_between(frames, low, high, color=line.get_color(), alpha=0.2)
        limits = {"median": lambda row: row["median"] * row["of_limit"], "rate": lambda row: row["rate"] / row["of_limit"]}
        if key in limits:
            limit = {row["frames"]: limits[key](row) * unit for row in rows}
            axes.plot(ticks, [limit[frames] for frames in ticks], "k--", linewidth=1, label="limit")
        values = [row[key] for row in rows if row[key]]
        wide = key != "rate" and max(values) > 10 * min(values)  # within one power of ten a logarithmic axis has no labels
        axes.set(xscale="log", yscale="log" if wide else "linear", xlabel="frames of 336 x 518", ylabel=label)
        axes.set_xticks(ticks, [str(frames) for frames in ticks])
        axes.minorticks_off()
    every[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def readme() -> str:
    """The README text, with one table and one plot of the results."""
    machine, name, group, variants = SHOWN
    results = dict(machines()[machine])[name]
    rows = groups(results)[group]
    lines = ["| frames | " + " | ".join(f"`{variant}`" if " " not in variant else variant for variant in variants) + " |"]
    lines.append("|---|" + "---|" * len(variants))
    for frames in sorted({row["frames"] for row in rows}):
        own = {row["variant"]: row for row in rows if row["frames"] == frames}
        shown = [own.get(variant) for variant in variants]  # a variant that failed or was skipped has no row
        cells = [f"{row['median'] * 1e3:.0f} ms, {row['of_limit']:.0%}" if row else "" for row in shown]
        lines.append(f"| {frames} | " + " | ".join(cells) + " |")
    path = (RESULTS / machine / f"{name}-{group}.png").relative_to(README.parent)
    lines += ["", f"![{group}]({path})", "", f"{results['provenance']['device']}, {results['provenance']['date']}."]
    before, _, rest = README.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + "\n" + "\n".join(lines) + "\n\n" + MARKS[1] + after


def write() -> Path:
    """Write RESULTS.md, the plots and the README's table. Returns the path of RESULTS.md."""
    for machine, files in machines().items():
        for name, results in files:
            found = groups(results)
            for path in plots(machine, name, results):
                group = path.stem.removeprefix(f"{name}-")
                draw(path, group.replace("-", ", "), found[group])
    PAGE.write_text(page())
    README.write_text(readme())
    return PAGE
