"""Depth maps: 16-bit PNGs with their scales, and colour previews."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from ._views import check, depth_maps, depth_picture, inverse_depth_range


def write_depth(out_dir: str | Path, prediction: Prediction, frames: Frames) -> list[Path]:
    """Write `depth/<name>.png`, `depth/preview/<name>.png` and `depth/depth.json`, at the network's resolution. Returns the paths.

    depth = value * scale, in scene units along the camera's z. Every frame has its own scale, and value 0 means no valid depth, as in
    padding. All previews of a clip share one colour range, near = warm.
    """
    check(prediction, frames, "depth")
    folder = Path(out_dir) / "depth"
    depth = depth_maps(prediction, frames)
    limits = inverse_depth_range(depth)
    entries = []
    with AtomicFiles() as files:
        for name, frame in zip(frames.names, depth, strict=True):
            valid = np.isfinite(frame) & (frame > 0)
            low, high = (float(frame[valid].min()), float(frame[valid].max())) if valid.any() else (0.0, 0.0)
            scale = high / 65535 if high else 1.0
            values = np.where(valid, (np.where(valid, frame, 0) / scale).round().clip(1, 65535), 0).astype(np.uint16)
            Image.fromarray(values).save(files.add(folder / f"{name}.png"))
            Image.fromarray(depth_picture(frame, limits)).save(files.add(folder / "preview" / f"{name}.png"))
            entries.append({"name": name, "file": f"{name}.png", "scale": scale, "min": low, "max": high})
        note = "depth = value * scale along the camera's z, in scene units; value 0 = invalid"
        text = json.dumps({"convention": note, "frames": entries}, indent=1)
        files.add(folder / "depth.json").write_text(text + "\n", encoding="utf-8")
    return files.paths
