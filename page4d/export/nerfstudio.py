"""`transforms.json` as nerfstudio and instant-ngp read it, with pictures, masks, depth and points.

Format: https://docs.nerf.studio/quickstart/data_conventions.html. Cameras look along -z with y up, the world has z up, and the corner of
the first pixel is (0, 0).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from ._originals import original_depth, picture_names, static_mask, write_pictures
from ._percentiles import percentiles
from .options import DEFAULTS, ExportOptions
from .ply import write_vertices
from .scene import confident_points, gather, registered, scene_cameras
from .views import depth_map, is_depth

MAX_POINTS = 500_000
HALF = 0.5  # from our pixel coordinates to nerfstudio's
Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])  # from our world, whose y points down and z forward, to one with z up
OPENGL = np.diag([1.0, -1, -1, 1])  # from the axes of an OpenGL camera to those of an OpenCV camera
DEPTH_UNIT = 0.001  # scene units per step of a depth map: nerfstudio's default
LARGEST = 65535  # step
DEEPEST = 99.9  # percentile of the depths that must fit. What is deeper, such as sky, is unknown

log = logging.getLogger(__name__)


def write_nerfstudio(out_dir: Path, prediction: Prediction, frames: Frames, options: ExportOptions = DEFAULTS) -> list[Path]:
    """Write `nerfstudio/transforms.json`, `images/`, `masks/`, `depth/` and `points.ply` beside it. Returns the paths.

    Every frame has its own intrinsics, in pixels of the original picture, and its `timestamp`. Transforms are world-from-camera. The
    world is that of the other formats with z up: x, z, -y, as `applied_transform` says; lengths are in scene units. Masks and depth maps
    have the size of the pictures. Mask: 0 = moves, 255 = static. Depth has 16 bits: value * 0.001 (nerfstudio's default
    `depth_unit_scale_factor`) is in scene units along the camera's z, and 0 is unknown. If more than 0.1 % of the depths are beyond 65
    units, the step is larger, and a warning names it; what is still deeper is unknown. `points.ply` has the points that do not move, at
    most 500 000.

    Raises:
        InputError: no frame has a finite camera, or the original pictures cannot be read any more.
    """
    cameras = scene_cameras(prediction, frames)
    chosen = registered(cameras, frames, "nerfstudio")
    names = picture_names(frames)
    folder = Path(out_dir) / "nerfstudio"
    unit = _depth_unit(prediction, frames, chosen)
    entries = []
    with AtomicFiles() as files:
        write_pictures(folder / "images", names, frames, files, chosen)
        for i in chosen:
            height, width = frames.original_sizes[i]
            intrinsics, stem = cameras.original[i], names[i].rsplit(".", 1)[0]
            entry = {
                "file_path": f"images/{names[i]}",
                "timestamp": frames.timestamps[i],
                "w": width,
                "h": height,
                "fl_x": intrinsics[0, 0],
                "fl_y": intrinsics[1, 1],
                "cx": intrinsics[0, 2] + HALF,
                "cy": intrinsics[1, 2] + HALF,
                "transform_matrix": [*(Z_UP @ cameras.world_from_camera[i] @ OPENGL).tolist(), [0.0, 0.0, 0.0, 1.0]],
                "depth_file_path": f"depth/{stem}.png",
            }
            depth = original_depth(prediction, frames, i)
            known = (depth > 0) & (depth <= LARGEST * unit)
            steps = np.where(known, (depth / unit).round().clip(1, LARGEST), 0).astype(np.uint16)
            Image.fromarray(steps).save(files.add(folder / entry["depth_file_path"]))
            if prediction.mask is not None:
                entry["mask_path"] = f"masks/{stem}.png"
                static_mask(prediction, frames, i, options.moving).save(files.add(folder / entry["mask_path"]))
            entries.append(entry)
        parts = confident_points(prediction, frames, max_points=MAX_POINTS, moving=options.moving, static_only=True)
        points, _ = gather(parts, min(MAX_POINTS, prediction.images[0, :, 0].numel()))
        write_vertices(files.add(folder / "points.ply"), points, Z_UP[:, :3])
        scene = {
            "camera_model": "OPENCV",
            "k1": 0.0,
            "k2": 0.0,
            "p1": 0.0,
            "p2": 0.0,
            "applied_transform": Z_UP.tolist(),
            "ply_file_path": "points.ply",
            "depth_unit_scale_factor": unit,
            "frames": entries,
        }
        files.add(folder / "transforms.json").write_text(json.dumps(scene, indent=1) + "\n", encoding="utf-8")
    return files.paths


def _depth_unit(prediction: Prediction, frames: Frames, chosen: list[int]) -> float:
    """Scene units per step of the depth maps: nerfstudio's default, or the first power of ten above it that reaches nearly all depths."""

    def depths() -> Iterator[NDArray[Any]]:
        for i in chosen:
            depth = depth_map(prediction, frames, i)
            yield depth[is_depth(depth)]

    (deep,) = percentiles(depths, [DEEPEST]) or [0.0]
    unit = DEPTH_UNIT
    while deep > LARGEST * unit:
        unit *= 10
    if unit > DEPTH_UNIT:
        log.warning("nerfstudio: depth reaches %.3g, give nerfstudio --depth-unit-scale-factor %g", deep, unit)
    return unit
