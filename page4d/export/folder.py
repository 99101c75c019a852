"""The way back: an output folder of `page4d infer` as a prediction and its frames."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.frames import Frames
from ..errors import InputError
from ..prediction import Prediction
from .views import GEOMETRY, check

SHAPES = {  # a letter is a size that all fields share, a digit is a size
    "images": "1S3HW",
    "mask": "1Shw",
    "pose_enc": "1S9",
    "intrinsics": "1S33",
    "depth": "1SHW1",
    "depth_conf": "1SHW",
    "world_points": "1SHW3",
    "world_points_conf": "1SHW",
    "track": "1SN2",
    "vis": "1SN",
    "valid": "1SHW",
}


def load_folder(out: str | Path, fields: Sequence[str] = tuple(SHAPES)) -> tuple[Prediction, Frames]:
    """The prediction (B = 1) and the frames (S of H x W pixels) of a folder that `page4d infer` wrote, or of a .npz file alone.

    `predictions.npz` has the tensors. `cameras.json`, if the folder has one, has names, timestamps, sizes of the originals and the map to
    them. Without it the originals are taken to be the frames themselves, without their padding, and are named frame_000000 and so on. The
    frames do not know where the original pictures are.

    Args:
        out: the folder or the file.
        fields: of the prediction, which are read if they are there. `images` and what cameras and depth need are always read.

    Raises:
        InputError: there is no such folder or file, it is damaged, it has no depth or no cameras, or cameras.json is of another run.
    """
    out = Path(out)
    path = out / "predictions.npz" if out.is_dir() else out
    if not path.is_file():
        if out.is_dir():
            above = next((folder for folder in out.absolute().parents if (folder / "predictions.npz").is_file()), None)
            advice = f"give {str(above)!r}" if above else "give an output folder of page4d infer, whose --export holds default or npz"
            raise InputError(f"there is no predictions.npz in {str(out)!r}: {advice}")
        raise InputError(f"{str(out)!r} does not exist: give the output folder of page4d infer")
    prediction = _prediction(path, {"images", "intrinsics", *GEOMETRY, *fields})
    cameras = out / "cameras.json"
    frames = _described(prediction, cameras) if out.is_dir() and cameras.is_file() else _in_memory(prediction)
    try:
        check(prediction, frames, *GEOMETRY)
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}") from error
    return prediction, frames


def _prediction(path: Path, names: set[str]) -> Prediction:
    if not zipfile.is_zipfile(path):
        raise InputError(f"{str(path)!r} is not a predictions.npz, or it is cut off: give one that page4d infer wrote")
    try:
        with np.load(path, allow_pickle=False) as file:
            plan = str(file["attention"]) if "attention" in file.files and file["attention"].dtype.kind == "U" else None
            tensors: dict[str, Any] = {name: torch.from_numpy(file[name]) for name in SHAPES if name in names and name in file.files}
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
        raise InputError(f"{str(path)!r} cannot be read ({error}): run page4d infer again, with --export npz") from error
    wrong = _misfit(tensors)
    if wrong:
        raise InputError(f"{str(path)!r} is not a prediction of one sequence: {wrong}; give a file that page4d infer wrote")
    return Prediction(attention=plan, **tensors)


def _misfit(tensors: dict[str, Tensor]) -> str:
    """What is wrong with the shapes. Empty if nothing is."""
    if "images" not in tensors:
        return "it has no images"
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        letters = SHAPES[name]
        wanted = [int(letter) if letter.isdigit() else sizes.get(letter, size) for letter, size in zip(letters, tensor.shape, strict=False)]
        if len(letters) != tensor.dim() or wanted != list(tensor.shape) or 0 in tensor.shape:
            return f"{name} has the shape {' x '.join(map(str, tensor.shape)) or 'of a number'}"
        sizes |= dict(zip(letters, tensor.shape, strict=True))
    return ""


def _described(prediction: Prediction, path: Path) -> Frames:
    """The frames as cameras.json describes them."""
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["frames"]
        networks = [entry["network"] for entry in entries]
        sizes = {(int(network["height"]), int(network["width"])) for network in networks}
        frames = Frames(
            images=prediction.images[0],
            names=[str(entry["name"]) for entry in entries],
            timestamps=[float(entry["timestamp"]) for entry in entries],
            original_sizes=[(int(entry["height"]), int(entry["width"])) for entry in entries],
            scale=torch.tensor([network["scale"] for network in networks], dtype=torch.float64).view(-1, 2),
            offset=torch.tensor([network["offset"] for network in networks], dtype=torch.float64).view(-1, 2),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: numbers of the wrong shape
        raise InputError(f"{str(path)!r} is damaged ({error}): run page4d infer again, with --export npz,trajectory") from error
    count, size = prediction.images.shape[1], tuple(prediction.images.shape[-2:])
    if len(frames) != count or sizes != {size}:
        found = f"{len(frames)} frames of {' or '.join(f'{height} x {width}' for height, width in sorted(sizes)) or 'no size'}"
        raise InputError(
            f"{str(path)!r} is of another run: it has {found}, and predictions.npz {count} of {size[0]} x {size[1]}; "
            "run page4d infer again, with --export npz,trajectory"
        )
    return frames


def _in_memory(prediction: Prediction) -> Frames:
    """Frames without originals. Their padding is what `valid` says: all that lies outside its bounding box."""
    images = prediction.images[0]
    count, _, height, width = images.shape
    boxes = [(0, height, 0, width)] * count
    if prediction.valid is not None:
        for i, valid in enumerate(prediction.valid[0].bool()):
            rows, columns = valid.any(1).nonzero()[:, 0], valid.any(0).nonzero()[:, 0]
            boxes[i] = (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1) if len(rows) else (0, 0, 0, 0)
    return Frames(
        images=images,
        names=[f"frame_{i:06d}" for i in range(count)],
        timestamps=[float(i) for i in range(count)],
        original_sizes=[(bottom - top, right - left) for top, bottom, left, right in boxes],
        scale=torch.ones(count, 2, dtype=torch.float64),
        offset=torch.tensor([[left, top] for top, _, left, _ in boxes], dtype=torch.float64),
    )
