"""`transforms.json`: the cameras of nerfstudio, instant-ngp and the synthetic scenes of NeRF."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ..images import IMAGE_SUFFIXES, stored_size
from .camera import ROUNDING, Array, Posed, about, check_present, content, extrinsics_of, intrinsics_of

PERSPECTIVE = {"PERSPECTIVE", "SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV"}  # of "camera_model"
NOT_PERSPECTIVE = ("is_fisheye", "equirectangular", "latlong", "ortho")  # that instant-ngp says with true
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
FLIP = np.diag([1.0, -1.0, -1.0])  # from OpenGL's camera axes (x right, y up, z back) to OpenCV's

log = logging.getLogger(__name__)


def read(path: Path) -> list[Posed]:
    """The pictures of a transforms.json, in its order.

    Paths of pictures start at its folder and may lack their suffix. Where the file does not give the size of a picture, the header of the
    picture does. One warning says that lens distortion is left out.

    Raises:
        InputError: the file is damaged or something else, a camera is not a perspective one, or a picture is needed and missing.
    """
    with about(repr(str(path))):
        whole = _object(path)
        frames = whole.get("frames")
        if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
            raise InputError('it is no transforms.json, as it has no list "frames": give one, or a COLMAP model')
        listed = [  # what a frame says itself goes before what is said for all, and null says nothing
            {name: value for values in (whole, frame) for name, value in values.items() if value is not None} for frame in frames
        ]
        images = []
        for number, values in enumerate(listed):
            with about(f"frame {number}"):
                images.append(_image(path.parent, values.get("file_path")))
    if any(not {"w", "h"} <= values.keys() for values in listed):
        check_present(images, path)
    with about(repr(str(path))):
        found = []
        for number, (values, image) in enumerate(zip(listed, images, strict=True)):
            with about(f"frame {number}"):
                found.append(_posed(values, image))
        if any(_number(values, name) for values in listed for name in DISTORTION if name in values):
            log.warning("%s: the lens distortion is left out, the pinhole part of the cameras is kept", path)
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        whole = json.loads(content(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8, or too many brackets
        raise InputError(f"it is damaged or no JSON ({error}): copy it again") from error
    return whole if isinstance(whole, dict) else {}


def _image(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name.strip():
        raise InputError('it has no "file_path": export the cameras again')
    path = folder / name
    if not os.path.isfile(path) and "\\" in name:  # written on Windows
        path = folder / name.replace("\\", "/")
    suffixes = [".png", ".jpg", *sorted(IMAGE_SUFFIXES)]
    known = [Path(f"{path}{suffix}") for suffix in (*suffixes, *map(str.upper, suffixes))]
    return next((candidate for candidate in (path, *known) if os.path.isfile(candidate)), path)


def _posed(values: dict[str, Any], image: Path) -> Posed:
    _check_perspective(values)
    if {"w", "h"} <= values.keys():
        width, height = _side(values, "w"), _side(values, "h")
    else:
        width, height = stored_size(image)
    fx, fy = _focal_lengths(values, width, height)
    cx = _number(values, "cx") if "cx" in values else width / 2
    cy = _number(values, "cy") if "cy" in values else height / 2
    return Posed(values["file_path"], image, width, height, _extrinsics(values.get("transform_matrix")), intrinsics_of(fx, fy, cx, cy))


def _check_perspective(values: dict[str, Any]) -> None:
    model = values.get("camera_model", "OPENCV")
    other = next((name for name in NOT_PERSPECTIVE if values.get(name)), None)
    if not isinstance(model, str) or model not in PERSPECTIVE or other:
        raise InputError(f"its camera is no pinhole camera ({other or repr(model)[:40]}): undistort the pictures first")


def _focal_lengths(values: dict[str, Any], width: int, height: int) -> tuple[float, float]:
    """In pixels, by the length or by the angle of view. That of y is that of x unless it is given."""
    if "fl_x" in values:
        fx = _number(values, "fl_x")
        return fx, _number(values, "fl_y") if "fl_y" in values else fx
    if "camera_angle_x" not in values:
        raise InputError('it has neither "fl_x" nor "camera_angle_x": export the cameras again')
    fx = _by_angle(values, "camera_angle_x", width)
    return fx, _by_angle(values, "camera_angle_y", height) if "camera_angle_y" in values else fx


def _by_angle(values: dict[str, Any], name: str, side: int) -> float:
    angle = _number(values, name)
    if not 0 < angle < math.pi:
        raise InputError(f'"{name}" is {angle:g} and not between 0 and pi radians: export the cameras again')
    return side / 2 / math.tan(angle / 2)


def _extrinsics(matrix: Any) -> Array:
    """Camera-from-world (3, 4) in OpenCV's axes, of world-from-camera (4, 4) or (3, 4) in OpenGL's."""
    rows = matrix if isinstance(matrix, list) and all(isinstance(row, list) and len(row) == 4 for row in matrix) else []
    if len(rows) not in (3, 4):
        raise InputError('its "transform_matrix" does not have 4 rows of 4 numbers: export the cameras again')
    pose = np.array([[_finite(value, '"transform_matrix"') for value in row] for row in rows])
    if len(rows) == 4 and np.abs(pose[3] - (0, 0, 0, 1)).max() > ROUNDING:
        raise InputError('the last row of its "transform_matrix" is not 0 0 0 1: export the cameras again')
    rotation = FLIP @ pose[:3, :3].T
    return extrinsics_of(rotation, -rotation @ pose[:3, 3])


def _side(values: dict[str, Any], name: str) -> int:
    side = _number(values, name)
    if side < 1 or side != int(side):
        raise InputError(f'"{name}" is {side:g} and not a number of pixels: export the cameras again')
    return int(side)


def _number(values: dict[str, Any], name: str) -> float:
    return _finite(values[name], f'"{name}"')


def _finite(value: Any, name: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} holds {value!r:.40}, which is not a finite number: export the cameras again")
    return number
