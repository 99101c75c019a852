"""What the mask does for a seam, by how much of the picture moves: `python -m benchmarks.long_video_seams`.

Two chunks of true depth and cameras with 2 % noise, each in a world of its own; people before the camera have another depth in the second
one, 1.4 times as far. Errors of the similarity between them: scale (relative) + rotation (radians) + translation (in median depths). The
masks are the true one, by patches, that which the network predicts for these frames, and none.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import avg_pool2d

from page4d import Page4D
from page4d.data.sample import Sample
from page4d.data.synthetic import SyntheticScenes
from page4d.geometry import Similarity, encode_pose, quaternion_to_matrix
from page4d.long_video.join import moved
from page4d.long_video.seams import seam
from page4d.prediction import Prediction

from .measure import provenance

COMMAND = "python -m benchmarks.long_video_seams"
SIZE, SPAN, OVERLAP = (56, 84), 16, 4
BINS = {"10 %": (0.05, 0.2), "30 %": (0.2, 0.4), "50 %": (0.4, 0.65)}  # of the common pixels
MASKS = ("true", "predicted", "none")


def world(number: int) -> Similarity:
    generator = torch.Generator().manual_seed(number)
    turn = quaternion_to_matrix(torch.randn(4, generator=generator, dtype=torch.float64))
    scale = torch.rand((), generator=generator, dtype=torch.float64) * 3 + 0.2
    return Similarity(scale, turn, 5 * torch.randn(3, generator=generator, dtype=torch.float64))


def chunk(sample: Sample, part: slice, factor: float, number: int) -> Prediction:
    """Noisy truth of some frames, in world `number`, with the true mask."""
    assert sample.depth is not None and sample.dynamic is not None
    pose = encode_pose(sample.extrinsics[part].double(), sample.intrinsics[part].double(), SIZE)
    moves, depth = sample.dynamic[part], sample.depth[part]
    noise = 1 + 0.02 * torch.randn(depth.shape, generator=torch.Generator().manual_seed(number))
    depth = torch.where(moves, factor * depth, depth) * noise
    mask = 0.5 - avg_pool2d(moves.float(), 7)
    truth = Prediction(
        sample.images[part][None], mask[None], pose[None], depth=depth[None, ..., None], depth_conf=torch.ones_like(depth)[None]
    )
    return moved(truth, world(number))


def error(found: Similarity, true: Similarity, unit: float) -> float:
    angle = torch.linalg.matrix_norm(found.rotation - true.rotation) / math.sqrt(2)
    return float((found.scale / true.scale - 1).abs() + angle + (found.translation - true.translation).norm() / unit)


def measure(model: Page4D, scenes: SyntheticScenes) -> dict[str, list[dict[str, float]]]:
    """By bin a row for each seam: the errors by mask."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in BINS}
    starts = range(0, scenes.frames - 2 * SPAN, SPAN - OVERLAP)
    for sample, start in ((sample, start) for index in range(len(scenes)) for sample in [scenes[index]] for start in starts):
        middle = start + SPAN - OVERLAP
        assert sample.dynamic is not None
        share = float(sample.dynamic[middle : middle + OVERLAP].float().mean())
        name = next((name for name, (low, high) in BINS.items() if low <= share < high), None)
        if name is None:
            continue
        first, second = (chunk(sample, slice(s, s + SPAN), factor, s) for s, factor in ((start, 1.0), (middle, 1.4)))
        with torch.inference_mode():
            predicted = [model(part.images, outputs=["mask"]).mask for part in (first, second)]
        true = world(start).after(world(middle).inverse())
        assert first.depth is not None
        masked = [replace(part, mask=mask) for part, mask in zip((first, second), predicted, strict=True)]
        seams = {
            "true": seam(first, second, OVERLAP),
            "predicted": seam(masked[0], masked[1], OVERLAP),
            "none": seam(first, second, OVERLAP, mask=False),
        }
        unit = float(first.depth.median())
        found[name].append({key: error(one.similarity, true, unit) for key, one in seams.items()})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--moving", type=int, default=5, help="people before the camera (default: 5)")
    parser.add_argument("--sequences", type=int, default=10)
    parser.add_argument("--seed", type=int, default=600)
    parser.add_argument("--json", type=Path, help="write each seam's values here")
    args = parser.parse_args(argv)
    model = Page4D.from_pretrained(args.weights, device="cpu").eval()
    found = measure(model, SyntheticScenes("walk", frames=300, size=SIZE, seed=args.seed, length=args.sequences, moving=args.moving))
    print("| moving | seams | " + " | ".join(f"{mask} mask" for mask in MASKS) + " |\n|---|" + "---:|" * (1 + len(MASKS)))
    for name, rows in found.items():
        cells = [f"{statistics.median(row[mask] for row in rows):.4f}" if rows else "" for mask in MASKS]
        print(f"| about {name} | {len(rows)} | {' | '.join(cells)} |")
    if args.json is not None:
        args.json.write_text(json.dumps({**provenance("cpu", COMMAND), "arguments": vars(args) | {"json": None}, "seams": found}) + "\n")


if __name__ == "__main__":
    main()
