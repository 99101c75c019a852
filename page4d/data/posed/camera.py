"""A picture whose camera is known, and that camera in the pixels of the picture as it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..orientation import MATRIX, UPRIGHT

ROUNDING = 1e-3  # of rotations that were written with few digits; more is not a rotation

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Posed:
    """A picture and its OpenCV pinhole camera: x_cam = R x_world + t, pixels = K x_cam / z."""

    name: str  # as the source has it, such as "left/0001.jpg"
    image: Path  # where the picture should be
    width: int  # of the picture that the camera was made for, in pixels
    height: int
    extrinsics: Array  # (3, 4) camera-from-world
    intrinsics: Array  # (3, 3) in pixels of that picture; the centre of the first pixel is (0, 0)

    def in_picture(self, size: tuple[int, int], orientation: int) -> tuple[Array, Array]:
        """Extrinsics (3, 4) and intrinsics (3, 3) for the upright picture of `size` (height, width), stored as the EXIF `orientation` says.

        A camera belongs to the pixels as they are stored. If its size fits only the upright picture, it belongs to that.

        Raises:
            InputError: the picture has another shape than the camera's, or is stored mirrored. The message does not name the file.
        """
        upright = size[::-1]
        stored = size if orientation in (5, 6, 7, 8) else upright
        own = (self.width, self.height)
        for found, turn in ((stored, orientation), (upright, UPRIGHT)):
            if _similar(found, own):
                return _turned(self.extrinsics, _scaled(self.intrinsics, np.array(found) / own), found, turn)
        sizes = f"the picture has {stored[0]} x {stored[1]} pixels and its camera {own[0]} x {own[1]} (width x height)"
        raise InputError(f"{sizes}: give the pictures that the cameras were made for, or pictures scaled from them")


def _similar(picture: tuple[int, int], camera: tuple[int, int]) -> bool:
    """Whether one is a scaled copy of the other, but for a pixel that the rounding of a side gains or loses."""
    errors = [abs(picture[i] - camera[i] * picture[1 - i] / camera[1 - i]) for i in (0, 1)]
    return min(errors) <= 1


def _scaled(intrinsics: Array, scale: Array) -> Array:
    """Scaling leaves the corner of the picture in place. That lies half a pixel beyond the centre of the first pixel."""
    x, y = scale
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]]) @ intrinsics


def _turned(extrinsics: Array, intrinsics: Array, size: tuple[int, int], orientation: int) -> tuple[Array, Array]:
    """The camera turned about its axis with its picture of `size` (width, height)."""
    a, b, c, d = MATRIX.get(orientation, MATRIX[UPRIGHT])
    if a * d - b * c < 0:
        raise InputError(f"the picture is stored mirrored (EXIF orientation {orientation}), which no camera sees: save it upright")
    turn = np.array([[a, c, 0], [b, d, 0], [0, 0, 1]], dtype=np.float64)
    centre = np.array([(size[0] - 1) / 2, (size[1] - 1) / 2, 0])
    pixels = turn.copy()
    pixels[:, 2] += abs(turn) @ centre - turn @ centre
    return turn @ extrinsics, pixels @ intrinsics @ turn.T


def intrinsics_of(fx: float, fy: float, cx: float, cy: float) -> Array:
    """The matrix (3, 3) of focal lengths and a principal point in pixels, where the corner of the first pixel is (0, 0).

    Raises:
        InputError: a number is not finite, or a focal length is not positive.
    """
    if not np.isfinite([fx, fy, cx, cy]).all() or min(fx, fy) <= 0:
        raise InputError(f"focal lengths {fx:g}, {fy:g} and principal point {cx:g}, {cy:g} are no camera: export the cameras again")
    return np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])


def extrinsics_of(rotation: Array, translation: Array) -> Array:
    """The pose (3, 4) of a rotation (3, 3) and a translation (3).

    Raises:
        InputError: a number is not finite, or the rotation is none.
    """
    if not (np.isfinite(rotation).all() and np.isfinite(translation).all()):
        raise InputError("its pose has a number that is not finite: export the cameras again")
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers near the largest, which are no rotation either
        error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if not error <= ROUNDING:
        raise InputError("its pose is scaled or skewed, not a rotation: export the cameras again, with the scale in the positions alone")
    if np.linalg.det(rotation) < 0:
        raise InputError("its pose mirrors the scene, which no rotation does: export the cameras again")
    return np.concatenate([rotation, translation[:, None]], 1)


@contextmanager
def about(what: str) -> Iterator[None]:
    """Say in an InputError what it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def content(path: Path) -> bytes:
    """The bytes of a file of cameras. InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): check the path and its permissions") from error


def check_present(images: Sequence[Path], source: Path) -> None:
    """InputError if pictures that a source lists are missing."""
    missing = [image for image in images if not os.path.isfile(image)]
    if missing:
        count = f"{len(missing)} of the {len(images)} pictures" if len(images) > 1 else "the only picture"
        raise InputError(f"{str(source)!r}: {count} that it lists cannot be found, first {str(missing[0])!r}: copy them there")
