"""Resize one image to the network's size, and record the coordinate map back to the original.

Coordinates here are continuous: the corner of the first pixel is 0 and its centre 0.5. processed = original * scale + offset.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import InputError

PATCH = 14
DEFAULT_SIZE = 518

Size = int | tuple[int, int]  # a width (longer side in pad mode), or (height, width)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processed:
    """One image at the network's size. Still 8 bits, which takes a quarter of the memory until all images are read."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    original_size: tuple[int, int]  # height, width
    scale: tuple[float, float]  # x, y
    offset: tuple[float, float]  # x, y


def check_size(size: Size | None, mode: str) -> Size:
    """The size to use (None = 518). Raises InputError with a size that would work, or for an unknown mode."""
    if mode not in ("crop", "pad"):
        raise InputError(f"unknown preprocessing mode {mode!r}: use 'crop' or 'pad'")
    size = DEFAULT_SIZE if size is None else size
    for side in (size,) if isinstance(size, int) else size:
        if side < PATCH or side % PATCH:
            nearest = max(PATCH, round(side / PATCH) * PATCH)
            raise InputError(f"size {side} does not work: sides must be positive multiples of {PATCH}, for example {nearest}")
    return size


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, with transparent pixels on white. InputError if the range of its greys is unknown."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_8_bit(image))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image.convert("RGBA"))
    return image.convert("RGB")


def preprocess(image: Image.Image, *, size: Size = DEFAULT_SIZE, mode: str = "crop") -> Processed:
    """Resize one image (bicubic, antialiased) and crop or pad it. `size` and `mode` are those of `page4d.data.load_frames`."""
    image = to_rgb(image)
    if isinstance(size, int):
        return _to_width(image, size) if mode == "crop" else _to_square(image, size)
    return _cover(image, *size) if mode == "crop" else _contain(image, *size)


def stack(processed: list[Processed]) -> tuple[Tensor, Tensor, Tensor]:
    """Images (S, 3, H, W) fp32 in [0, 1], with their scale (S, 2) and offset (S, 2) fp64. There must be at least one image.

    Images of different sizes are padded with white to the largest height and width, with a warning.
    """
    height = max(p.pixels.shape[0] for p in processed)
    width = max(p.pixels.shape[1] for p in processed)
    sizes = {p.pixels.shape[:2] for p in processed}
    if len(sizes) > 1:
        log.warning("the images have %d different sizes after resizing: padding all to %d x %d with white", len(sizes), height, width)
    images = torch.ones(len(processed), 3, height, width)
    offset = torch.empty(len(processed), 2, dtype=torch.float64)
    for i, p in enumerate(processed):
        h, w = p.pixels.shape[:2]
        top, left = (height - h) // 2, (width - w) // 2
        images[i, :, top : top + h, left : left + w] = torch.from_numpy(p.pixels).permute(2, 0, 1).float() / 255
        offset[i, 0], offset[i, 1] = p.offset[0] + left, p.offset[1] + top
    return images, torch.tensor([p.scale for p in processed], dtype=torch.float64), offset


def _to_width(image: Image.Image, width: int) -> Processed:
    """Resize to `width`, with the height rounded to a multiple of 14. Rows beyond a square are cut off at top and bottom."""
    height = _round_to_patch(image.height * (width / image.width), image)
    pixels = _resize(image, (width, height))
    start = max(0, (height - width) // 2)
    return Processed(pixels[start : start + width], (image.height, image.width), _scale(image, width, height), (0.0, float(-start)))


def _to_square(image: Image.Image, side: int) -> Processed:
    """Resize the longer side to `side`, with the other rounded to a multiple of 14, and pad with white to a square."""
    if image.width >= image.height:
        width, height = side, _round_to_patch(image.height * (side / image.width), image)
    else:
        width, height = _round_to_patch(image.width * (side / image.height), image), side
    return _pad(image, width, height, side, side)


def _cover(image: Image.Image, height: int, width: int) -> Processed:
    """Resize the largest centred part of the image with the aspect ratio of height x width.

    It is resampled directly from that box. So the aspect ratio is exact, and extreme ones take no extra memory.
    """
    scale = max(height / image.height, width / image.width)
    left, top = max(0.0, (image.width - width / scale) / 2), max(0.0, (image.height - height / scale) / 2)
    pixels = _resize(image, (width, height), (left, top, image.width - left, image.height - top))
    return Processed(pixels, (image.height, image.width), (scale, scale), (-left * scale, -top * scale))


def _contain(image: Image.Image, height: int, width: int) -> Processed:
    """Resize the whole image to fit into height x width, and pad with white."""
    scale = min(height / image.height, width / image.width)
    return _pad(image, max(1, round(image.width * scale)), max(1, round(image.height * scale)), height, width)


def _pad(image: Image.Image, width: int, height: int, full_height: int, full_width: int) -> Processed:
    top, left = (full_height - height) // 2, (full_width - width) // 2
    pixels = np.full((full_height, full_width, 3), 255, np.uint8)
    pixels[top : top + height, left : left + width] = _resize(image, (width, height))
    return Processed(pixels, (image.height, image.width), _scale(image, width, height), (float(left), float(top)))


def _round_to_patch(side: float, image: Image.Image) -> int:
    rounded = round(side / PATCH) * PATCH
    if rounded == 0:
        raise InputError(
            f"an image of {image.height} x {image.width} pixels (height x width) is too elongated: its short side would be 0 patches; "
            "crop it first, or give a height and a width"
        )
    return rounded


def _to_8_bit(image: Image.Image) -> NDArray[np.uint8]:
    """16-bit greys as 8-bit (H, W). Pillow opens some such files in a 32-bit mode, and would itself clip them to white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError("its grey values are fractions or have more than 16 bits: convert it to 8 or 16 bit first")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> NDArray[np.uint8]:
    return np.array(image.resize(size, Image.Resampling.BICUBIC, box=box))


def _scale(image: Image.Image, width: int, height: int) -> tuple[float, float]:
    return width / image.width, height / image.height
