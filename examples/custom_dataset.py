"""Evaluate a model on a dataset of your own: a name, the sequences, and a function that reads one of them.

    python examples/custom_dataset.py [FOLDER]

FOLDER holds one .npz file per sequence, with images, extrinsics, intrinsics and depth. Without it, one rendered scene is used.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from page4d import Page4D
from page4d.data.sample import Sample
from page4d.data.synthetic import SyntheticScenes
from page4d.evaluation import Dataset, Protocol, Rules, evaluate
from page4d.evaluation.report import table

SIZE = (56, 84)  # height and width that the bundled weights were trained at


def read(folder: Path, sequence: str) -> Sample:
    """Read one sequence. Fields of `Sample` for which a dataset has no ground truth stay None."""
    with np.load(folder / f"{sequence}.npz") as file:
        images, extrinsics, intrinsics, depth = (torch.from_numpy(file[key]) for key in ("images", "extrinsics", "intrinsics", "depth"))
    return Sample(images, extrinsics, intrinsics, depth=depth, valid=depth > 0, name=sequence)


def open_folder(folder: Path) -> Dataset:
    sequences = tuple(sorted(path.stem for path in folder.glob("*.npz")))
    return Dataset("mine", sequences, partial(read, folder), Rules(tasks=frozenset({"pose", "depth"})))


with tempfile.TemporaryDirectory() as temporary:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
    if folder == Path(temporary):
        scene = SyntheticScenes("static", frames=4, size=SIZE, seed=1)[0]
        arrays = {key: getattr(scene, key).numpy() for key in ("images", "extrinsics", "intrinsics", "depth")}
        np.savez(folder / "scene-0.npz", **arrays)
    dataset = open_folder(folder)
    model = Page4D.from_pretrained("nano", device="cpu")
    print(table({dataset.name: evaluate(model, dataset, {"pose", "depth"}, protocol=Protocol(SIZE), rules=dataset.rules)}))
