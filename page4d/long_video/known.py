"""Cameras that are known from elsewhere: read, and matched with the frames of a clip."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.posed import locate, read_posed
from ..errors import InputError
from ..geometry import Similarity, quaternion_to_matrix
from ..prediction import Cameras
from .align import AlignmentError, from_cameras

ROUNDING = 1e-3  # of rotations that were written with few digits
LEAST = 3  # cameras that determine a similarity


@dataclass(frozen=True)
class Known:
    """Cameras by the name of their picture, or by time. The world and its unit are those of the file."""

    keys: list[str] | Tensor  # names without suffix, or seconds (n,) fp64, ascending
    extrinsics: Tensor  # (n, 3, 4) camera-from-world, fp64
    intrinsics: Tensor | None  # (n, 3, 3) in pixels of the originals, fp64

    def __len__(self) -> int:
        return len(self.extrinsics)


def read_cameras(path: str | Path) -> Known:
    """Our cameras.json (or an output folder that has one), a trajectory in TUM's format, a COLMAP model or a transforms.json.

    Raises:
        InputError: it is none of these, or damaged. The message names the file.
    """
    path = Path(path)
    ours = path / "cameras.json" if path.is_dir() else path
    if ours.is_file() and ours.suffix.lower() == ".json" and (entries := _entries(ours)) is not None:
        return _ours(entries, ours)
    if locate(path) is not None:
        posed = read_posed(path)
        names = [Path(camera.name).stem for camera in posed]
        extrinsics, intrinsics = (torch.from_numpy(np.stack([getattr(x, name) for x in posed])) for name in ("extrinsics", "intrinsics"))
        return _checked(Known(names, extrinsics, intrinsics), path)
    if path.is_file():
        return _tum(path)
    raise InputError(f"{str(path)!r} has no cameras: give a cameras.json, a TUM trajectory, a COLMAP model folder or a transforms.json")


def _entries(path: Path) -> list[dict[str, Any]] | None:
    """The frames of our cameras.json. None if it is another JSON file."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON ({error}): give the file again") from None
    frames = whole.get("frames") if isinstance(whole, dict) else None
    known = isinstance(frames, list) and all(isinstance(frame, dict) and "extrinsics" in frame for frame in frames)
    return frames if known and frames else None


def _ours(entries: list[dict[str, Any]], path: Path) -> Known:
    """Cameras that are not finite, which are null in the file, are left out; intrinsics may be missing."""
    try:
        kept = [entry for entry in entries if not any(x is None for row in entry["extrinsics"] for x in row)]
        extrinsics = torch.tensor([entry["extrinsics"] for entry in kept], dtype=torch.float64)
        nothing = [[np.nan] * 3] * 3
        rows = [entry.get("intrinsics") or nothing for entry in kept]
        intrinsics = torch.tensor([[[np.nan if x is None else x for x in row] for row in k] for k in rows], dtype=torch.float64)
        names = [str(entry["name"]) for entry in kept]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{str(path)!r} is damaged ({error}): write it again with --export trajectory") from None
    if not kept:
        raise InputError(f"{str(path)!r} has no camera that is finite: write it again with --export trajectory")
    return _checked(Known(names, extrinsics, intrinsics), path)


def _tum(path: Path) -> Known:
    """Lines of: timestamp tx ty tz qx qy qz qw, world-from-camera. Lines that begin with # are comments."""
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                values = [float(word) for word in line.split()]
                if len(values) != 8:
                    raise InputError(f"{str(path)!r}, line {number}: a TUM trajectory has 8 numbers in a line, not {len(values)}")
                rows.append(values)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} is not a TUM trajectory ({error}): give timestamp tx ty tz qx qy qz qw in each line") from None
    if not rows:
        raise InputError(f"{str(path)!r} has no cameras: give timestamp tx ty tz qx qy qz qw in each line")
    table = torch.tensor(sorted(rows), dtype=torch.float64)
    if not bool(table.isfinite().all()):
        raise InputError(f"{str(path)!r} has a number that is not finite: write the trajectory again")
    rotation = quaternion_to_matrix(table[:, 4:]).mT
    extrinsics = torch.cat([rotation, -(rotation @ table[:, 1:4, None])], -1)
    return _checked(Known(table[:, 0], extrinsics, None), path)


def _checked(known: Known, path: Path) -> Known:
    if known.extrinsics.shape[1:] != (3, 4) or (known.intrinsics is not None and known.intrinsics.shape[1:] != (3, 3)):
        raise InputError(f"{str(path)!r} has cameras of another shape than 3 x 4 and 3 x 3: write them again")
    rotation = known.extrinsics[..., :3]
    error = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    proper = known.extrinsics.isfinite().all(2).all(1) & (error < ROUNDING) & (torch.linalg.det(rotation) > 0)
    if not bool(proper.all()):
        raise InputError(f"{str(path)!r} has a camera whose pose is not a rotation and a translation: write the cameras again")
    if known.intrinsics is not None and bool((known.intrinsics[:, [0, 1], [0, 1]] <= 0).any()):
        raise InputError(f"{str(path)!r} has a camera whose focal length is not positive: write the cameras again")
    if isinstance(known.keys, list) and len(set(known.keys)) < len(known.keys):
        twice = next(key for key in known.keys if known.keys.count(key) > 1)
        raise InputError(
            f"{str(path)!r} has two cameras named {twice!r}, without the suffix: frames are matched by these names, so change one"
        )
    return known


def anchor(predicted: Tensor, known: Tensor) -> tuple[Similarity, float]:
    """The similarity from the world of predicted extrinsics (n, 3, 4) to that of the known ones of the same frames, and its error.

    The error is the RMS distance of the camera centres afterwards, relative to their RMS distance to their mean.

    Raises:
        AlignmentError: fewer than three cameras, or they stand still or disagree.
    """
    if len(known) < LEAST:
        raise AlignmentError(f"{len(known)} known cameras, and {LEAST} are needed")
    try:
        found = from_cameras(predicted, known)
    except AlignmentError:
        words = "the predicted cameras stand still or go another way than the known ones"
        raise AlignmentError(f"{words}: leave out --cameras (with --resume, if the run was in chunks)") from None
    there, true = (Cameras(x[None], x[None]).centers[0].double() for x in (found.cameras(predicted.double()), known))
    return found, float((there - true).norm() / (true - true.mean(0)).norm())


def matched(known: Known, names: list[str], timestamps: list[float]) -> tuple[list[int], Cameras]:
    """The frames that have a known camera, and these cameras; intrinsics are NaN where the file has none.

    By name (without suffix), or by the nearest time that is nearer than half of the time between two frames.

    Raises:
        InputError: fewer than three frames have one, or these stand in one place.
    """
    if isinstance(known.keys, list):
        where = {key: number for number, key in enumerate(known.keys)}
        pairs = [(frame, where[name]) for frame, name in enumerate(names) if name in where]
        missing = f"their names are such as {known.keys[0]!r}, and those of the frames such as {names[0]!r}"
    else:
        times = torch.tensor(timestamps, dtype=torch.float64)
        apart = (times[:, None] - known.keys).abs()
        reach = float(times.diff().median()) / 2 if len(times) > 1 else 0.0
        nearest = apart.min(1)
        pairs = [(frame, int(nearest.indices[frame])) for frame in range(len(times)) if float(nearest.values[frame]) <= reach]
        missing = f"their times begin at {float(known.keys[0]):g} s, and those of the frames at {timestamps[0]:g} s"
    if len(pairs) < LEAST:
        raise InputError(f"{len(pairs)} frames have a known camera, and {LEAST} are needed: {missing}")
    chosen = [number for _, number in pairs]
    centres = Cameras(known.extrinsics[None, chosen], known.extrinsics.new_empty(0)).centers[0]
    if not bool((centres - centres.mean(0)).norm() > 1e-9 * (1 + centres.norm())):
        raise InputError(f"the known cameras of the {len(pairs)} frames stand in one place, so nothing says how long anything is")
    intrinsics = torch.full((len(pairs), 3, 3), torch.nan, dtype=torch.float64) if known.intrinsics is None else known.intrinsics[chosen]
    return [frame for frame, _ in pairs], Cameras(known.extrinsics[chosen], intrinsics)
