"""What chunks do to nano's paths and depths, on rendered walks: `python -m benchmarks.long_video_quality --sequences 20`.

Each walk is run in one pass over all frames, and in chunks: aligned without and with the mask, and with loops. ATE is relative to that of a
camera that stands still. The table has the means, and of chunks the paired difference to the row that is named, with its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from page4d import Page4D
from page4d.data.sample import Sample
from page4d.data.synthetic import SyntheticScenes
from page4d.evaluation.depth import ALIGNMENTS
from page4d.evaluation.pose import pose_metrics
from page4d.long_video.chunks import Chunking
from page4d.long_video.passes import Passes
from page4d.long_video.run import run
from page4d.long_video.store import Store
from page4d.prediction import Prediction

from .measure import provenance

COMMAND = "python -m benchmarks.long_video_quality"
SIZE = (56, 84)
ONE_PASS = "one pass"
COLUMNS = ("ATE", "RPE t", "RPE r, °", "AbsRel", "seams", "loops")


def metrics(prediction: Prediction, sample: Sample) -> dict[str, float]:
    assert prediction.depth is not None and sample.depth is not None
    pose = pose_metrics(prediction.cameras.extrinsics[0], sample.extrinsics)
    depth, true = prediction.depth[0, ..., 0], sample.depth
    seen = true > 0
    scale, _ = ALIGNMENTS["scale"](depth[seen], true[seen])
    off = (scale * depth[seen] / true[seen] - 1).abs().mean()
    return {"ATE": pose["ate"] / pose["ate_constant"], "RPE t": pose["rpe_trans"], "RPE r, °": pose["rpe_rot"], "AbsRel": float(off)}


def measure(model: Page4D, scenes: SyntheticScenes, chunkings: Sequence[Chunking]) -> dict[str, list[dict[str, float]]]:
    """By variant a row for each walk."""
    passes = Passes(model, {"outputs": ["camera", "depth", "mask"]})
    found: dict[str, list[dict[str, float]]] = {}
    for index in tqdm(range(len(scenes)), unit="walk"):
        sample = scenes[index]
        found.setdefault(ONE_PASS, []).append(metrics(passes(sample.images)[0], sample))
        for chunking in chunkings:
            chunks, name = chunking.divide(len(sample.images)), f"{chunking.size},{chunking.overlap}"
            variants = {"no mask": (False, False), "mask": (True, False), "mask, loops": (True, True)}
            with tempfile.TemporaryDirectory() as folder:
                store = Store(Path(folder), {})  # of passes, which are the same
                for variant, (mask, loops) in variants.items():
                    long = run(sample.images, chunks, passes, store, lambda _, shape: torch.empty(shape), loops=loops, mask=mask)
                    seams = statistics.fmean(seam.error for seam in long.seams)
                    row = {**metrics(long.prediction, sample), "seams": seams, "loops": float(len(long.loops or ()))}
                    found.setdefault(f"{name}: {variant}", []).append(row)
    return found


def paired(rows: list[dict[str, float]], base: list[dict[str, float]], title: str) -> str:
    """The mean paired difference and its standard error."""
    differences = [row[title] - other[title] for row, other in zip(rows, base, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{statistics.fmean(differences):+.3f} ± {error:.3f}"


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown, see above."""
    lines = [f"| | {' | '.join(COLUMNS)} | ATE to one pass | ATE to the row above |", "|---|" + "---:|" * (len(COLUMNS) + 2)]
    above: list[dict[str, float]] | None = None
    for name, rows in found.items():
        cells = [f"{statistics.fmean(row[title] for row in rows):.3f}" if title in rows[0] else "" for title in COLUMNS]
        first = paired(rows, found[ONE_PASS], "ATE") if name != ONE_PASS else ""
        second = paired(rows, above, "ATE") if above is not None and ": no mask" not in name else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {first} | {second} |")
        above = rows
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--kind", default="walk", choices=["walk", "dynamic"])
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--moving", type=int, default=3, help="people before the camera (default: 3)")
    parser.add_argument("--seed", type=int, default=500, help="of the scenes (default: 500)")
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--chunks", default="16,4 24,6 60,15", help="separated by spaces (default: 16,4 24,6 60,15)")
    parser.add_argument("--json", type=Path, help="write each sequence's values here")
    args = parser.parse_args(argv)
    model = Page4D.from_pretrained(args.weights, device="cpu").eval()
    scenes = SyntheticScenes(args.kind, frames=args.frames, size=SIZE, seed=args.seed, length=args.sequences, moving=args.moving)
    found = measure(model, scenes, [Chunking.of(text) for text in args.chunks.split()])
    print(f"{args.frames} frames, {args.kind}, {args.moving} people, seed {args.seed}, {args.sequences} sequences\n\n{table(found)}")
    if args.json is not None:
        content: dict[str, Any] = {**provenance("cpu", COMMAND), "arguments": vars(args) | {"json": None}, "sequences": found}
        args.json.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
