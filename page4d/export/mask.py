"""The dynamics mask: as an overlay, and as grey values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from .color import to_uint8
from .views import MOTION_TITLE, array, check, font, frame_pixels, motion_map, motion_picture


def write_mask(out_dir: str | Path, prediction: Prediction, frames: Frames) -> list[Path]:
    """Write two PNGs per frame. Returns the paths.

    `mask/<name>.png`: `Prediction.motion` as a red overlay at the network's resolution, transparent up to 0.5 and full at 1.
    `mask/raw/<name>.png`: the motion as 8-bit grey at the size of the patch grid, value = 255 * motion.
    Padding has no overlay, and patches of padding alone are 0.
    """
    check(prediction, frames, "mask")
    folder = Path(out_dir) / "mask"
    grid = (prediction.motion.shape[-2], prediction.motion.shape[-1])
    raw = to_uint8(array(prediction.motion))
    with AtomicFiles() as files:
        for i, name in enumerate(frames.names):
            image = Image.fromarray(motion_picture(frame_pixels(prediction, i), motion_map(prediction, frames, i)))
            _label(image, MOTION_TITLE)
            image.save(files.add(folder / f"{name}.png"))
            inside = frames.frame(i).inside().float()
            shown = torch.nn.functional.adaptive_max_pool2d(inside, grid)[0].numpy() > 0  # patches that show any of the picture
            Image.fromarray(np.where(shown, raw[i], 0).astype(np.uint8)).save(files.add(folder / "raw" / f"{name}.png"))
    return files.paths


def _label(image: Image.Image, text: str) -> None:
    """Draw a line of text on a dark band at the lower left. Nothing is drawn if it does not fit or would hide much of the image."""
    draw = ImageDraw.Draw(image, "RGBA")
    typeface = font(max(10, image.height // 24))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=typeface)
    width, height = right - left + 10, bottom - top + 8
    if width > image.width or height > image.height / 4:
        return
    y = image.height - height
    draw.rectangle((0, y, width, image.height), fill=(0, 0, 0, 140))
    draw.text((5 - left, y + 4 - top), text, font=typeface, fill=(255, 255, 255, 255))
