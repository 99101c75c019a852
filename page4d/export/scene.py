"""What the geometry formats share: one set of cameras, and the confident points frame by frame, which never lie in memory all at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.frames import Frames
from ..errors import InputError
from ..prediction import Cameras, Prediction
from ._percentiles import percentiles
from .color import to_uint8
from .views import array, check, motion_map

Pairs = Iterator[tuple[Prediction, Frames]]

log = logging.getLogger(__name__)


def each_frame(prediction: Prediction, frames: Frames) -> Pairs:
    """The prediction and the frames of one picture at a time. Half precision becomes fp32, as geometry needs it."""
    for i in range(len(frames)):
        one = prediction.frame(i)
        half = any(value.dtype in (torch.float16, torch.bfloat16) for value in one.tensors().values())
        yield one.to(torch.float32) if half else one, frames.frame(i)


@dataclass(frozen=True)
class SceneCameras:
    """The cameras (S, ...) of one sequence in float64. Every format takes them from here."""

    extrinsics: NDArray[np.float64]  # (S, 3, 4), camera-from-world: x_cam = R x_world + t
    network: NDArray[np.float64]  # intrinsics (S, 3, 3) in pixels of the network's input, whose first pixel has its centre at (0, 0)
    original: NDArray[np.float64]  # the same in pixels of the original pictures

    @property
    def finite(self) -> NDArray[np.bool_]:
        """(S,): whether the camera exists. A field of view of 0 has an infinite focal length, one beyond pi a negative one."""
        numbers = np.concatenate([self.extrinsics, self.original], axis=2)
        return np.isfinite(numbers).reshape(len(numbers), -1).all(1) & (self.original[:, [0, 1], [0, 1]] > 0).all(1)

    @property
    def world_from_camera(self) -> NDArray[np.float64]:
        """Poses (S, 4, 4): the axes of the camera in the world, and its centre."""
        rotation = self.extrinsics[:, :, :3].transpose(0, 2, 1)
        poses = np.tile(np.eye(4), (len(rotation), 1, 1))
        poses[:, :3, :3] = rotation
        poses[:, :3, 3] = -np.einsum("sij,sj->si", rotation, self.extrinsics[:, :, 3])
        return poses


def scene_cameras(prediction: Prediction, frames: Frames) -> SceneCameras:
    check(prediction, frames, "pose_enc")
    assert prediction.pose_enc is not None
    known = None if prediction.intrinsics is None else prediction.intrinsics.detach().cpu().double()
    both = replace(prediction, pose_enc=prediction.pose_enc.detach().cpu().double(), intrinsics=known).cameras
    found = Cameras(both.extrinsics[0], both.intrinsics[0])
    original = frames.intrinsics_in_original(found.intrinsics)
    return SceneCameras(found.extrinsics.numpy(), found.intrinsics.numpy(), original.numpy())


def registered(cameras: SceneCameras, frames: Frames, format_name: str) -> list[int]:
    """The frames whose cameras a format can hold. A warning names the others; InputError if there is none."""
    found = np.flatnonzero(cameras.finite).tolist()
    left = [name for name, finite in zip(frames.names, cameras.finite, strict=True) if not finite]
    if not found:
        raise InputError(f"cannot export {format_name!r}: no frame has a finite camera")
    if left:
        log.warning("%s: %d frame(s) without a finite camera are left out, such as %s", format_name, len(left), left[0])
    return found


@dataclass(frozen=True)
class Points:
    """The confident points of one frame, N of them."""

    xyz: NDArray[np.float32]  # (N, 3) in the world: axes of the first camera, scene units
    rgb: NDArray[np.uint8]  # (N, 3)
    confidence: NDArray[np.float32]  # (N,)
    moving: NDArray[np.bool_]  # (N,): the motion of the pixel is above the threshold
    pixels: NDArray[np.int64]  # (N, 2): x, y of the pixel of the network's input


def confident_points(
    prediction: Prediction,
    frames: Frames,
    *,
    max_points: int,
    source: str = "depth",
    confidence_percentile: float = 50.0,
    moving: float = 0.5,
    static_only: bool = False,
) -> Iterator[Points]:
    """The points of each frame that are finite, show the picture (not its padding) and are confident enough.

    Confident enough is a confidence at or above the percentile of the clip. With more than `max_points`, every frame gives the same share
    of its points, at random with a fixed seed.

    Args:
        source: that of `Prediction.points`.
        moving: motion above which a pixel counts as moving. Without a dynamics mask nothing does.
        static_only: leave out what moves.
    """
    check(prediction, frames, *(("depth", "depth_conf", "pose_enc") if source == "depth" else ("world_points", "world_points_conf")))

    def kept(one: Prediction, frame: Frames) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        geometry, confidence = (one.depth, one.depth_conf) if source == "depth" else (one.world_points, one.world_points_conf)
        assert geometry is not None and confidence is not None
        values, certain = array(geometry)[0], array(confidence)[0]
        known = np.isfinite(values).all(-1) & np.isfinite(certain) & frame.inside().numpy()[0]
        if source == "depth":
            known &= (values[..., 0] > 0) & bool(scene_cameras(one, frame).finite[0])
        return certain, known

    def confidences() -> Iterator[NDArray[Any]]:
        for pair in each_frame(prediction, frames):
            certain, known = kept(*pair)
            yield certain[known]

    threshold = -np.inf
    if confidence_percentile > 0:
        (threshold,) = percentiles(confidences, [confidence_percentile]) or [np.inf]

    def chosen(one: Prediction, frame: Frames) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        certain, known = kept(one, frame)
        moves = motion_map(one, frame, 0) > moving if one.mask is not None else np.zeros(known.shape, bool)
        return known & (certain >= threshold) & ~(moves & static_only), moves

    total = np.cumsum([np.count_nonzero(chosen(*pair)[0]) for pair in each_frame(prediction, frames)])
    quota = total * min(max_points, total[-1]) // max(1, total[-1])
    generator = np.random.default_rng(0)
    for share, (one, frame) in zip(np.diff(quota, prepend=0), each_frame(prediction, frames), strict=True):
        keep, moves = chosen(one, frame)
        places = np.flatnonzero(keep)
        if share < len(places):
            places = np.sort(generator.choice(places, share, replace=False))
        point_map, confidence = one.points(source)
        rows, columns = np.divmod(places, keep.shape[1])
        yield Points(
            array(point_map)[0][rows, columns],
            to_uint8(array(one.images)[0][:, rows, columns].T),
            array(confidence)[0][rows, columns],
            moves[rows, columns],
            np.stack([columns, rows], -1),
        )


def gather(parts: Iterable[Points], limit: int) -> tuple[Points, list[int]]:
    """The points of all frames in one, at most `limit`, and how many each frame has.

    The arrays are allocated once. Many small ones that stay, between large ones that go, would leave holes as large as the clip.
    """
    kinds = {
        "xyz": ((3,), np.float32),
        "rgb": ((3,), np.uint8),
        "confidence": ((), np.float32),
        "moving": ((), bool),
        "pixels": ((2,), np.int64),
    }
    arrays = {name: np.empty((limit, *shape), dtype) for name, (shape, dtype) in kinds.items()}
    counts, total = [], 0
    for points in parts:
        count = len(points.xyz)
        for name, whole in arrays.items():
            whole[total : total + count] = getattr(points, name)
        counts.append(count)
        total += count
    return Points(**{name: whole[:total] for name, whole in arrays.items()}), counts
