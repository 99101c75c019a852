"""A COLMAP model: cameras, images and points in binary and in text, the pictures, and masks of what moves.

Format: https://colmap.github.io/format.html. There the corner of the first pixel is (0, 0), and its centre (0.5, 0.5).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.frames import Frames
from ..files import AtomicFiles
from ..geometry import matrix_to_quaternion
from ..prediction import Prediction
from ._originals import picture_names, static_mask, write_pictures
from ._static_tracks import StaticTracks, static_tracks
from .options import DEFAULTS, ExportOptions
from .scene import confident_points, registered, scene_cameras

MAX_POINTS = 500_000
PINHOLE = 1  # the number of the camera model
HALF = 0.5  # from our pixel coordinates to COLMAP's

COUNT = struct.Struct("<Q")
CAMERA = struct.Struct("<IiQQ4d")  # id, model, width, height, parameters
IMAGE = struct.Struct("<I7dI")  # id, quaternion w x y z, translation, camera's id
POINT = struct.Struct("<Q3d3BdQ")  # id, position, colour, error, number of observations
SEEN = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<u8")])  # an observation in an image
POINT_SEEN_ONCE = np.dtype(
    [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8"), ("image", "<u4"), ("index", "<u4")]
)


def write_colmap(out_dir: Path, prediction: Prediction, frames: Frames, options: ExportOptions = DEFAULTS) -> list[Path]:
    """Write `colmap/sparse/0` (cameras, images and points3D, `.bin` and `.txt`), `colmap/images` and `colmap/masks`. Returns the paths.

    Every frame is an image with a PINHOLE camera of its own, in pixels of the original picture. World: axes of the first camera (x right,
    y down, z forward), scene units. The points are those that do not move, at most 500 000, each observed in the frame that it comes from.
    Where there are tracks, those that do not move are points with an observation in every frame that sees them.
    `masks/<picture>.png`: 0 = moves, 255 = static, as COLMAP's `mask_path` expects.

    Raises:
        InputError: no frame has a finite camera, or the original pictures cannot be read any more.
    """
    cameras = scene_cameras(prediction, frames)
    chosen = registered(cameras, frames, "colmap")
    names = picture_names(frames)
    tracks = static_tracks(prediction, frames, cameras, options.moving)
    folder = Path(out_dir) / "colmap"
    parts = confident_points(prediction, frames, max_points=MAX_POINTS, moving=options.moving, static_only=True)
    with AtomicFiles() as files:
        with _Model(folder / "sparse" / "0", files, len(chosen)) as model:
            model.tracks(tracks)
            for i, points in enumerate(parts):
                if i not in chosen:
                    continue
                xy = frames.to_original(points.pixels.astype(np.float64), i)
                first = np.flatnonzero(tracks.seen[i])
                ids = model.points(points.xyz, points.rgb, image=i + 1, observed_before=len(first))
                seen = np.concatenate([tracks.xy[i, first], xy]), np.concatenate([first + 1, ids])
                model.image(i + 1, names[i], frames.original_sizes[i], cameras.original[i], cameras.extrinsics[i], *seen)
        write_pictures(folder / "images", names, frames, files, chosen)
        if prediction.mask is not None:
            for i in chosen:
                static_mask(prediction, frames, i, options.moving).save(files.add(folder / "masks" / f"{names[i]}.png"))
    return files.paths


class _Model:
    """The six files of a model, written image by image. Points of tracks come first and have the ids 1 to N, in the images too."""

    def __init__(self, folder: Path, files: AtomicFiles, images: int):
        kinds = ("cameras", "images", "points3D")
        self._binary = {kind: open(files.add(folder / f"{kind}.bin"), "wb") for kind in kinds}  # noqa: SIM115  # closed by __exit__
        self._text = {kind: open(files.add(folder / f"{kind}.txt"), "w", encoding="utf-8", errors="surrogateescape") for kind in kinds}  # noqa: SIM115
        for kind, count in (("cameras", images), ("images", images), ("points3D", 0)):
            self._binary[kind].write(COUNT.pack(count))
        self._text["cameras"].write("# CAMERA_ID MODEL WIDTH HEIGHT fx fy cx cy\n")
        self._text["images"].write("# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME\n# X Y POINT3D_ID, for each observation\n")
        self._text["points3D"].write("# POINT3D_ID X Y Z R G B ERROR, then IMAGE_ID POINT2D_IDX for each observation\n")
        self._points = 0

    def tracks(self, tracks: StaticTracks) -> None:
        """Write points that several images see. Call it before all others."""
        indices = np.cumsum(tracks.seen, axis=1) - 1  # of each observation in its image
        for n in range(len(tracks.xyz)):
            images = np.flatnonzero(tracks.seen[:, n])
            seen = np.stack([images + 1, indices[images, n]], -1).astype("<u4")
            values = (n + 1, *tracks.xyz[n].tolist(), *tracks.rgb[n].tolist(), float(tracks.error[n]))
            self._binary["points3D"].write(POINT.pack(*values, len(seen)) + seen.tobytes())
            self._text["points3D"].write(" ".join(f"{value:.9g}" for value in (*values, *seen.reshape(-1).tolist())) + "\n")
        self._points = len(tracks.xyz)

    def points(self, xyz: NDArray[Any], rgb: NDArray[Any], *, image: int, observed_before: int) -> NDArray[np.int64]:
        """Write points that one image sees, behind the observations that it has already. Returns their ids."""
        ids = np.arange(len(xyz)) + self._points + 1
        records = np.zeros(len(xyz), POINT_SEEN_ONCE)
        records["id"], records["xyz"], records["rgb"], records["length"], records["image"] = ids, xyz, rgb, 1, image
        records["index"] = np.arange(len(xyz)) + observed_before
        self._binary["points3D"].write(records.tobytes())
        rows = zip(ids.tolist(), *xyz.T.tolist(), *rgb.T.tolist(), records["index"].tolist(), strict=True)
        self._text["points3D"].writelines(
            f"{n} {x:.9g} {y:.9g} {z:.9g} {r} {g} {b} 0 {image} {index}\n" for n, x, y, z, r, g, b, index in rows
        )
        self._points += len(xyz)
        return ids

    def image(
        self,
        number: int,
        name: str,
        size: tuple[int, int],
        intrinsics: NDArray[np.float64],
        extrinsics: NDArray[np.float64],
        xy: NDArray[np.float64],
        ids: NDArray[np.int64],
    ) -> None:
        """Write an image with its camera, which has the same id, and its observations (N, 2) in our pixel coordinates."""
        fx, fy, cx, cy = (float(intrinsics[place]) for place in ((0, 0), (1, 1), (0, 2), (1, 2)))
        camera = (fx, fy, cx + HALF, cy + HALF)
        x, y, z, w = matrix_to_quaternion(torch.from_numpy(extrinsics[:, :3])).tolist()
        pose = (w, x, y, z, *extrinsics[:, 3].tolist())
        self._binary["cameras"].write(CAMERA.pack(number, PINHOLE, size[1], size[0], *camera))
        self._text["cameras"].write(f"{number} PINHOLE {size[1]} {size[0]} {_numbers(camera)}\n")
        seen = np.zeros(len(xy), SEEN)
        seen["x"], seen["y"], seen["point"] = xy[:, 0] + HALF, xy[:, 1] + HALF, ids
        encoded = name.encode("utf-8", "surrogateescape")
        self._binary["images"].write(IMAGE.pack(number, *pose, number) + encoded + b"\0" + COUNT.pack(len(xy)) + seen.tobytes())
        self._text["images"].write(f"{number} {_numbers(pose)} {number} {name}\n")
        self._text["images"].write(" ".join(f"{x:.6f} {y:.6f} {point}" for x, y, point in seen.tolist()) + "\n")

    def __enter__(self) -> _Model:
        return self

    def __exit__(self, *_: object) -> None:
        self._binary["points3D"].seek(0)
        self._binary["points3D"].write(COUNT.pack(self._points))
        for file in (*self._binary.values(), *self._text.values()):
            file.close()


def _numbers(values: Sequence[float] | Iterable[float]) -> str:
    return " ".join(f"{value:.17g}" for value in values)
