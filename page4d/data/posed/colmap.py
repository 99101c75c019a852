"""COLMAP models: `cameras` and `images`, as .bin or as .txt. Rigs, frames and points beside them are not needed."""

from __future__ import annotations

import codecs
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from .camera import Array, Posed, about, content, extrinsics_of, intrinsics_of

PERSPECTIVE = {  # by number in .bin: the name in .txt, how many focal lengths come first, how many distortion parameters come last
    0: ("SIMPLE_PINHOLE", 1, 0),
    1: ("PINHOLE", 2, 0),
    2: ("SIMPLE_RADIAL", 1, 1),
    3: ("RADIAL", 1, 2),
    4: ("OPENCV", 2, 4),
    6: ("FULL_OPENCV", 2, 8),
    12: ("SIMPLE_DIVISION", 1, 1),
    13: ("DIVISION", 2, 1),
}
OTHERS = {
    5: "OPENCV_FISHEYE",
    7: "FOV",
    8: "SIMPLE_RADIAL_FISHEYE",
    9: "RADIAL_FISHEYE",
    10: "THIN_PRISM_FISHEYE",
    11: "RAD_TAN_THIN_PRISM_FISHEYE",
    14: "SIMPLE_FISHEYE",
    15: "FISHEYE",
    16: "EUCM",
    17: "EQUIRECTANGULAR",
}
NUMBERS = {name: number for number, (name, _, _) in PERSPECTIVE.items()} | {name: number for number, name in OTHERS.items()}
POINT_BYTES = 24  # of a point in images.bin: x, y and the number of its 3-D point
UNIT = 1e-2  # how far a quaternion that was written with few digits may be from length 1

log = logging.getLogger(__name__)


class _Camera(NamedTuple):
    width: int
    height: int
    intrinsics: Array  # (3, 3)
    distorted: bool


class _Image(NamedTuple):
    name: str
    camera: int
    quaternion: tuple[float, ...]  # w, x, y, z
    translation: tuple[float, ...]


def is_model(folder: Path) -> bool:
    return _suffix(folder) is not None


def pictures_folder(model: Path) -> Path:
    """`images` beside the folder `sparse` of a model, or one level above. If there is none, the folder that holds `sparse`."""
    project = Path(os.path.abspath(model))
    if project.parent.name == "sparse":
        project = project.parent
    if project.name == "sparse":
        project = project.parent
    return next((folder for folder in (project / "images", project.parent / "images") if os.path.isdir(folder)), project)


def read(model: Path) -> list[Posed]:
    """The pictures of a model, in its order.

    One warning says that lens distortion is left out.

    Raises:
        InputError: a file is damaged, or a camera is not a perspective one. The message names the file.
    """
    suffix = _suffix(model)
    camera_file, image_file = (model / f"{name}{suffix}" for name in ("cameras", "images"))
    with about(repr(str(camera_file))):
        cameras = dict(_binary_cameras(_Bytes(camera_file)) if suffix == ".bin" else _text_cameras(camera_file))
    pictures, found, distorted = pictures_folder(model), [], False
    with about(repr(str(image_file))):
        for image in _binary_images(_Bytes(image_file)) if suffix == ".bin" else _text_images(image_file):
            with about(f"image {image.name!r}"):
                if image.camera not in cameras:
                    raise InputError(f"its camera {image.camera} is not in {camera_file.name}: write the model again")
                width, height, intrinsics, bent = cameras[image.camera]
                pose = extrinsics_of(_rotation(image.quaternion), np.array(image.translation))
            distorted |= bent
            found.append(Posed(image.name, pictures / image.name, width, height, pose, intrinsics))
    others = [folder for folder in model.parent.glob("*") if folder != model and is_model(folder)] if model.name == "0" else []
    if others:
        log.warning("%s: other models beside it are not read (%d): give the folder of one to read that one", model, len(others))
    if distorted:
        log.warning("%s: the lens distortion is left out, the pinhole part of the cameras is kept", model)
    return found


def _suffix(folder: Path) -> str | None:
    files = {end: [folder / f"cameras{end}", folder / f"images{end}"] for end in (".bin", ".txt")}
    return next((end for end, pair in files.items() if all(map(os.path.isfile, pair))), None)


def _camera(number: int, width: int, height: int, parameters: tuple[float, ...]) -> _Camera:
    _, focals, _ = PERSPECTIVE[number]
    if width < 1 or height < 1:
        raise InputError(f"a picture of {width} x {height} pixels cannot be: write the model again")
    intrinsics = intrinsics_of(parameters[0], parameters[focals - 1], *parameters[focals : focals + 2])
    distortion = parameters[focals + 2 :]
    if not np.isfinite(distortion).all():
        raise InputError("a distortion parameter is not finite: write the model again")
    return _Camera(width, height, intrinsics, any(distortion))


def _parameters(number: int, name: object) -> int:
    """How many parameters a camera model has. InputError if it is not a perspective one."""
    if number in PERSPECTIVE:
        _, focals, bends = PERSPECTIVE[number]
        return focals + 2 + bends
    if number in OTHERS:
        raise InputError(f"the camera model {OTHERS[number]} is no pinhole camera: undistort the pictures first (colmap image_undistorter)")
    raise InputError(f"there is no camera model {name!r}: write the model again")


def _rotation(quaternion: tuple[float, ...]) -> Array:
    """The matrix (3, 3) of a quaternion w, x, y, z."""
    values = np.array(quaternion)
    with np.errstate(over="ignore"):  # of numbers near the largest
        length = np.linalg.norm(values)
    if not abs(length - 1) <= UNIT:
        raise InputError(f"the length of its quaternion is {length:g} and not 1: write the model again")
    w, x, y, z = values / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


class _Bytes:
    """A little-endian file, read from its start."""

    def __init__(self, path: Path) -> None:
        self.data = content(path)
        self.place = 0

    def take(self, layout: str) -> tuple:
        start = self.place
        self.skip(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self.data, start)

    def skip(self, count: int) -> None:
        self.place += count
        if self.place > len(self.data):
            raise InputError("the file is cut off or damaged: copy it or write the model again")

    def name(self) -> str:
        """Text up to a zero."""
        start, end = self.place, self.data.find(b"\0", self.place)
        self.skip(end + 1 - start if end >= 0 else len(self.data) + 1)
        return _decoded(self.data[start:end])

    def end(self) -> None:
        if self.place < len(self.data):
            raise InputError("the file is longer than it should be, so it is damaged: copy it or write the model again")


def _decoded(data: bytes) -> str:
    """Text in UTF-8, with or without a byte order mark. Names of files may hold other bytes."""
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _binary_cameras(file: _Bytes) -> Iterator[tuple[int, _Camera]]:
    (count,) = file.take("Q")
    for _ in range(count):
        identity, number, width, height = file.take("IiQQ")
        with about(f"camera {identity}"):
            yield identity, _camera(number, width, height, file.take(f"{_parameters(number, number)}d"))
    file.end()


def _binary_images(file: _Bytes) -> Iterator[_Image]:
    (count,) = file.take("Q")
    for _ in range(count):
        _, *pose, camera = file.take("I7dI")
        name = file.name()
        file.skip(POINT_BYTES * file.take("Q")[0])
        yield _Image(name, camera, tuple(pose[:4]), tuple(pose[4:]))
    file.end()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1."""
    yield from enumerate((line.strip() for line in _decoded(content(path)).split("\n")), 1)


def _text_cameras(path: Path) -> Iterator[tuple[int, _Camera]]:
    for place, line in _lines(path):
        if not line or line.startswith("#"):
            continue
        with about(f"line {place}"):
            fields = line.split()
            if len(fields) < 4:
                raise _misread("ID MODEL WIDTH HEIGHT PARAMETERS")
            identity, name, width, height, *parameters = fields
            number = NUMBERS.get(name, -1)
            if len(parameters) != _parameters(number, name):
                raise _misread(f"ID {name} WIDTH HEIGHT and {_parameters(number, name)} parameters")
            yield _whole(identity), _camera(number, _whole(width), _whole(height), tuple(map(_real, parameters)))


def _text_images(path: Path) -> Iterator[_Image]:
    lines = _lines(path)
    for place, line in lines:
        if not line or line.startswith("#"):
            continue
        with about(f"line {place}"):
            fields = line.split(maxsplit=9)
            if len(fields) < 10:
                raise _misread("ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
            pose = tuple(map(_real, fields[1:8]))
            image = _Image(fields[9], _whole(fields[8]), pose[:4], pose[4:])
        place, points = next(lines, (place + 1, ""))
        if len(points.split()) % 3:
            raise InputError(f"line {place}: it should be empty or hold points, X Y ID for each: write the model again")
        yield image


def _misread(expected: str) -> InputError:
    return InputError(f"it does not have the form {expected}: write the model again")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{text!r:.40} is not a whole number: write the model again") from error


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{text!r:.40} is not a number: write the model again") from error
