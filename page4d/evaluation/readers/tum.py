"""TUM RGB-D, and the Bonn dynamic dataset in the same layout: lists of files and poses with timestamps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.sample import Sample
from ...errors import InputError
from ...geometry import quaternion_to_matrix
from .base import Dataset, Request, Rules, existing_folder, present
from .files import read_depths_png, read_images

EXPECTED = "folders with rgb.txt, depth.txt and groundtruth.txt"
MAX_GAP = 0.02  # maximum time difference between a colour image and its depth image or pose, in seconds

TUM_CAMERAS = {  # fx, fy, cx, cy of the colour camera; the key is a part of the sequence's name
    "freiburg1": (517.3, 516.5, 318.6, 255.3),
    "freiburg2": (520.9, 521.0, 325.1, 249.7),
    "freiburg3": (535.4, 539.2, 320.1, 247.6),
}
BONN_CAMERA = (542.822841, 542.576870, 315.593520, 237.756098)
BONN_SEQUENCES = tuple(f"rgbd_bonn_{name}" for name in ("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous"))


def open_tum(where: str, request: Request) -> Dataset:
    """All sequences in the folder `where`: every third frame, at most 90."""
    folder = existing_folder(Path(where).expanduser(), f"TUM RGB-D with {EXPECTED}")
    found = tuple(sorted(path.parent.name for path in folder.glob("*/rgb.txt")))
    sequences = present(found, folder, f"TUM RGB-D with {EXPECTED}")

    def read(sequence: str) -> Sample:
        known = [camera for name, camera in TUM_CAMERAS.items() if name in sequence]
        if not known:
            raise InputError(f"the camera of {sequence!r} is unknown: its name should contain one of {', '.join(TUM_CAMERAS)}")
        return _read(folder / sequence, known[0], request.frames or 90, stride=3)

    return Dataset("tum", sequences, read)


def open_bonn(where: str, request: Request) -> Dataset:
    """The five sequences of the depth protocol in the folder `where`: the first 110 frames.

    Only for depth: the recorded poses are those of the motion-capture markers, not of the camera.
    """
    folder = Path(where).expanduser()
    expected = f"the Bonn RGB-D dynamic dataset with {EXPECTED}, such as {BONN_SEQUENCES[0]}"
    sequences = present(BONN_SEQUENCES, existing_folder(folder, expected), expected)

    def read(sequence: str) -> Sample:
        return _read(folder / sequence, BONN_CAMERA, request.frames or 110, stride=1)

    return Dataset("bonn", sequences, read, Rules(tasks=frozenset({"depth", "mono"}), max_depth=70.0))


def _read(folder: Path, camera: tuple[float, float, float, float], frames: int, stride: int) -> Sample:
    """Every `stride`-th colour image that has a depth image and a pose; at most `frames` images."""
    color_times, colors = _table(folder / "rgb.txt", 1)
    depth_times, depths = _table(folder / "depth.txt", 1)
    pose_times, poses = _table(folder / "groundtruth.txt", 7)
    depth_index, pose_index = nearest(color_times, depth_times), nearest(color_times, pose_times)
    kept = np.flatnonzero((depth_index >= 0) & (pose_index >= 0))[::stride][:frames]
    if not len(kept):
        raise InputError(f"no colour image in {str(folder)!r} has a depth image and a pose within {MAX_GAP:g} seconds")
    depth = read_depths_png([folder / depths[i][0] for i in depth_index[kept]])
    fx, fy, cx, cy = camera
    intrinsics = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return Sample(
        images=read_images([folder / colors[i][0] for i in kept]),
        extrinsics=_extrinsics(np.array([poses[i] for i in pose_index[kept]], dtype=np.float64)),
        intrinsics=intrinsics.expand(len(kept), 3, 3),
        depth=depth,
        valid=depth > 0,
        name=folder.name,
    )


def _table(path: Path, columns: int) -> tuple[NDArray[np.float64], list[list[str]]]:
    """The ascending times and the columns after them, from lines `time column ...`. Lines that start with # are comments."""
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        times = np.array([float(row[0]) for row in rows])
        if columns > 1:
            [float(x) for row in rows for x in row]
    except FileNotFoundError:
        raise InputError(f"{str(path)!r} is missing: a sequence has rgb.txt, depth.txt and groundtruth.txt") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r} ({error}): copy it again") from error
    if not rows or any(len(row) <= columns for row in rows):
        raise InputError(f"{str(path)!r} should have lines of a time and {columns} more columns: copy it again")
    order = np.argsort(times, kind="stable")
    return times[order], [rows[i][1 : columns + 1] for i in order]


def nearest(times: NDArray[np.float64], others: NDArray[np.float64], max_gap: float = MAX_GAP) -> NDArray[np.int64]:
    """For each of `times` (N,) the index of the nearest of `others` (M,), in ascending order; -1 if it is more than `max_gap` away."""
    right = np.searchsorted(others, times).clip(1, max(len(others) - 1, 1))
    left = right - 1
    right = right.clip(max=len(others) - 1)
    index = np.where(np.abs(others[left] - times) <= np.abs(others[right] - times), left, right)
    return np.where(np.abs(others[index] - times) <= max_gap, index, -1)


def _extrinsics(poses: NDArray[np.float64]) -> Tensor:
    """Camera-from-world extrinsics (S, 3, 4) from world-from-camera rows tx ty tz qx qy qz qw."""
    rows = torch.from_numpy(poses)
    rotation = quaternion_to_matrix(rows[:, 3:]).mT
    return torch.cat([rotation, -rotation @ rows[:, :3, None]], -1).float()
