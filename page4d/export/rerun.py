"""The scene as a Rerun recording, with a time line."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from .extras import need
from .frusta import frustum_length
from .options import DEFAULTS, ExportOptions
from .scene import confident_points, registered, scene_cameras
from .views import VISIBLE, array, depth_map, frame_pixels, is_depth, motion_map

MAX_POINTS = 1_000_000
HALF = 0.5  # from our pixel coordinates to Rerun's, where the corner of the first pixel is (0, 0)
RECORDING = "00000000-0000-0000-0000-70616765346d"  # one id for all: two exports of one scene do not differ by it
MOVING, STATIC_COLOR, MOVING_COLOR = 1, (0, 0, 0, 0), (255, 32, 32, 160)


def write_rerun(out_dir: Path, prediction: Prediction, frames: Frames, options: ExportOptions = DEFAULTS) -> list[Path]:
    """Write `scene.rrd`. Returns its path.

    World: axes of the first camera (x right, y down, z forward), scene units. Time lines: `frame` (index) and `time` (seconds, or the index
    of an image file). Entities: `world/static` and `world/moving` (points, at most a million, the moving ones of the current frame),
    `world/path`, `world/camera` (pose and intrinsics at the network's resolution) and below it `image`, `depth` (fp32, 0 = unknown),
    `motion` (1 = moving) and `tracks`.

    Raises:
        InputError: rerun-sdk is not installed, or no frame has a finite camera.
    """
    rr = need("rerun", "rerun files")
    cameras = scene_cameras(prediction, frames)
    chosen = registered(cameras, frames, "rerun")
    poses, length = cameras.world_from_camera, frustum_length(prediction, frames)
    with AtomicFiles() as files, _recording(rr, files.add(Path(out_dir) / "scene.rrd")) as stream:
        stream.log("world", rr.ViewCoordinates.RDF, static=True)
        stream.log("world/path", rr.LineStrips3D([poses[chosen, :3, 3]]), static=True)
        classes = [rr.AnnotationInfo(0, "static", STATIC_COLOR), rr.AnnotationInfo(MOVING, "moving", MOVING_COLOR)]
        stream.log("world/camera/motion", rr.AnnotationContext(classes), static=True)
        parts = confident_points(prediction, frames, max_points=MAX_POINTS, moving=options.moving)
        for i, points in enumerate(parts):
            if i not in chosen:
                continue
            stream.set_time("frame", sequence=i)
            stream.set_time("time", duration=frames.timestamps[i])
            still = ~points.moving
            stream.log(f"world/static/{i:06d}", rr.Points3D(points.xyz[still], colors=points.rgb[still]))
            stream.log("world/moving", rr.Points3D(points.xyz[~still], colors=points.rgb[~still]))
            stream.log("world/camera", rr.Transform3D(translation=poses[i, :3, 3], mat3x3=poses[i, :3, :3]))
            intrinsics = cameras.network[i].copy()
            intrinsics[:2, 2] += HALF
            pixels = frame_pixels(prediction, i)
            size = pixels.shape[1::-1]
            pinhole = rr.Pinhole(
                image_from_camera=intrinsics, resolution=size, camera_xyz=rr.ViewCoordinates.RDF, image_plane_distance=length
            )
            stream.log("world/camera", pinhole)
            stream.log("world/camera/image", rr.EncodedImage(contents=_jpeg(pixels), media_type="image/jpeg"))
            depth = depth_map(prediction, frames, i)
            stream.log("world/camera/depth", rr.DepthImage(np.where(is_depth(depth), depth, 0).astype(np.float32), meter=1.0))
            if prediction.mask is not None:
                moves = motion_map(prediction, frames, i) > options.moving
                stream.log("world/camera/motion", rr.SegmentationImage(moves.astype(np.uint8)))
            if prediction.track is not None:
                visible = np.ones(prediction.track.shape[2], bool) if prediction.vis is None else array(prediction.vis)[i] >= VISIBLE
                stream.log("world/camera/tracks", rr.Points2D(array(prediction.track)[i][visible] + HALF))
    return files.paths


@contextmanager
def _recording(rr: Any, path: Path) -> Iterator[Any]:
    """A stream that is written into `path`. OSError if that fails.

    The library itself says nothing of a full disk, or waits for ever. So it writes into a pipe, and what comes out is written here.
    """
    stream = rr.RecordingStream("page4d", recording_id=RECORDING, send_properties=False)
    if not hasattr(os, "mkfifo"):
        stream.save(path)
        yield stream
        stream.disconnect()
        return
    errors: list[OSError] = []

    def drain(pipe: Path) -> None:
        with open(pipe, "rb") as source:
            try:
                with open(path, "wb") as file:
                    shutil.copyfileobj(source, file)
            except OSError as error:
                errors.append(error)
                while source.read(1 << 20):  # so that the other end can finish
                    pass

    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder) / path.name
        os.mkfifo(pipe)
        thread = threading.Thread(target=drain, args=(pipe,), daemon=True)
        thread.start()
        stream.save(pipe)
        try:
            yield stream
        finally:
            stream.disconnect()
            thread.join()
    if errors:
        raise OSError(errors[0].errno, errors[0].strerror, str(path)) from errors[0]


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
