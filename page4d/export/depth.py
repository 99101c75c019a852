"""Depth as 16-bit PNGs with a scale, or as fp32 EXR, and as colour previews."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from ._originals import original_depth
from .extras import need
from .options import DEFAULTS, ExportOptions
from .views import check, depth_map, depth_picture, inverse_depth_range, is_depth


def write_depth(out_dir: str | Path, prediction: Prediction, frames: Frames, options: ExportOptions = DEFAULTS) -> list[Path]:
    """Write `depth/<name>.png` or `.exr`, `depth/preview/<name>.png` and `depth/depth.json`. Returns the paths.

    Depth is in scene units along the camera's z. It has the network's resolution, or with `depth_size="original"` that of the original
    pictures. 0 means that no depth is known, as in padding and in parts that were cropped away.

    PNG: depth = value * scale, and every frame has its own scale. EXR: the channel Z is the depth in fp32.
    Previews have the network's resolution. All previews of a clip share one colour range, near = warm.
    """
    check(prediction, frames, "depth")
    folder = Path(out_dir) / "depth"
    limits = inverse_depth_range(prediction, frames)
    entries = []
    with AtomicFiles() as files:
        for i, name in enumerate(frames.names):
            seen = depth_map(prediction, frames, i)
            depth = original_depth(prediction, frames, i) if options.depth_size == "original" else seen
            entries.append(
                {"name": name, "file": f"{name}.{options.depth_type}"} | _write(depth, files.add(folder / f"{name}.{options.depth_type}"))
            )
            Image.fromarray(depth_picture(seen, limits)).save(files.add(folder / "preview" / f"{name}.png"))
        note = "depth = value * scale along the camera's z, in scene units; value 0 = invalid"
        text = json.dumps({"convention": note, "frames": entries}, indent=1)
        files.add(folder / "depth.json").write_text(text + "\n", encoding="utf-8")
    return files.paths


def _write(depth: NDArray[Any], path: Path) -> dict[str, Any]:
    """Write one map by the suffix of the path. Returns its scale and its range."""
    valid = is_depth(depth)
    known = np.where(valid, depth, 0).astype(np.float32)
    low, high = (float(depth[valid].min()), float(depth[valid].max())) if valid.any() else (0.0, 0.0)
    if path.suffix == ".exr":
        exr = need("OpenEXR", "EXR files")
        with exr.File({"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}, {"Z": known}) as file:
            try:
                file.write(str(path))
            except RuntimeError as error:  # its only kind of error
                raise OSError(errno.EIO, str(error).rsplit(". ", 1)[-1].rstrip("."), str(path)) from error
        return {"scale": 1.0, "min": low, "max": high}
    scale = high / 65535 if high else 1.0
    Image.fromarray(np.where(valid, (known / scale).round().clip(1, 65535), 0).astype(np.uint16)).save(path)
    return {"scale": scale, "min": low, "max": high}
