"""The dynamics mask over the frames."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from ._views import check, font, frame_pixels, motion_maps, motion_picture, motion_range


def write_mask(out_dir: str | Path, prediction: Prediction, frames: Frames) -> list[Path]:
    """`mask/<name>.png`: `Prediction.motion` in red over the frame, from clear to full within the range printed in the corner."""
    check(prediction, frames, "mask")
    limits = motion_range(prediction)
    label = f"motion {limits[0]:.2f} (clear) to {limits[1]:.2f} (red)"
    with AtomicFiles() as files:
        maps = motion_maps(prediction)
        for i, name in enumerate(frames.names):
            image = Image.fromarray(motion_picture(frame_pixels(prediction, i), maps[i], limits))
            _label(image, label)
            image.save(files.add(Path(out_dir) / "mask" / f"{name}.png"))
    return files.paths


def _label(image: Image.Image, text: str) -> None:
    """A line of text on a dark band at the lower left."""
    draw = ImageDraw.Draw(image, "RGBA")
    typeface = font(max(10, image.height // 24))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=typeface)
    y = image.height - (bottom - top) - 8
    draw.rectangle((0, y, right - left + 10, image.height), fill=(0, 0, 0, 140))
    draw.text((5 - left, y + 4 - top), text, font=typeface, fill=(255, 255, 255, 255))
