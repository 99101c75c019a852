"""Resize one image to the network's size, and record the coordinate map back to the original.

Coordinates here are continuous: the corner of the first pixel is 0 and its centre 0.5. processed = original * scale + offset.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..files import Allocate
from ..system import budget_of
from . import deep

PATCH = 14
DEFAULT_SIZE = 518
LARGEST_SIDE = 65534  # a multiple of 14; image libraries stop there too

Size = int | tuple[int, int]  # a width (longer side in pad mode), or (height, width)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processed:
    """One image at the network's size."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    original_size: tuple[int, int]  # height, width
    scale: tuple[float, float]  # x, y
    offset: tuple[float, float]  # x, y


def check_size(size: object, mode: str) -> Size:
    """The size to use (None = 518). Whole numbers of any type count, such as np.int64(84) or 84.0.

    Raises:
        InputError: a side is not a positive multiple of 14 (the message has one that is) or too large, or the mode is unknown.
    """
    if mode not in ("crop", "pad"):
        raise InputError(f"unknown preprocessing mode {mode!r}: use 'crop' or 'pad'")
    if size is None:
        return DEFAULT_SIZE
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise InputError(f"size {size!r} does not work: give a width, or (height, width)")
        return _check_side(size[0]), _check_side(size[1])
    return _check_side(size)


def _check_side(value: Any) -> int:
    try:
        side = int(value)
        whole = not isinstance(value, (str, bool)) and side == value
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise InputError(f"size {value!r} does not work: give a width, or (height, width), as whole numbers")
    if side > LARGEST_SIDE:
        raise InputError(f"size {side if side < 10**12 else '(very large)'} does not work: sides are at most {LARGEST_SIDE} pixels")
    if side < PATCH or side % PATCH:
        nearest = max(PATCH, round(side / PATCH) * PATCH)
        raise InputError(f"size {side} does not work: sides must be positive multiples of {PATCH}, for example {nearest}")
    return side


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, with transparent pixels on white. InputError if the range of its greys is unknown."""
    if image.mode == "F" or image.mode.startswith("I"):
        greys = np.asarray(image)
        image = Image.fromarray(deep.to_8_bit(greys, deep.shown_range([greys], "full")))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image.convert("RGBA"))
    return image.convert("RGB")


def preprocess(image: Image.Image, *, size: Size = DEFAULT_SIZE, mode: str = "crop") -> Processed:
    """Resize one image (bicubic, antialiased) and crop or pad it. `size` and `mode` are those of `page4d.data.load_frames`."""
    image = to_rgb(image)
    if isinstance(size, int):
        return _to_width(image, size) if mode == "crop" else _to_square(image, size)
    return _cover(image, *size) if mode == "crop" else _contain(image, *size)


class Stack:
    """Images (S, 3, H, W) fp32 in [0, 1] that come one by one, at most `count`.

    Images of different sizes are padded with white to the largest height and width, with a warning.

    Args:
        allocate: gives the memory. None: ordinary memory, after a check that it suffices.
    """

    def __init__(self, count: int, allocate: Allocate | None = None):
        self._count, self._allocate = count, allocate or _in_memory
        self._images = torch.empty(0)
        self._sizes: list[tuple[int, int]] = []
        self._scale: list[tuple[float, float]] = []
        self._offset: list[tuple[float, float]] = []

    def add(self, image: Processed) -> None:
        height, width = image.pixels.shape[:2]
        self._grow(height, width)
        self._place(len(self._sizes), torch.from_numpy(image.pixels).permute(2, 0, 1).float() / 255)
        self._sizes.append((height, width))
        self._scale.append(image.scale)
        self._offset.append(image.offset)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The images, their scale (S, 2) and offset (S, 2) fp64. There must be at least one image."""
        full = (self._images.shape[-2], self._images.shape[-1])
        different = len(set(self._sizes))
        if different > 1:
            log.warning("the images have %d different sizes after resizing: padding all to %d x %d with white", different, *full)
        padding = [[left, top] for left, top in (self._corner(size) for size in self._sizes)]
        offset = torch.tensor(self._offset, dtype=torch.float64) + torch.tensor(padding, dtype=torch.float64)
        return self._images[: len(self._sizes)], torch.tensor(self._scale, dtype=torch.float64), offset

    def _grow(self, height: int, width: int) -> None:
        """Make room for images of this size: a new tensor, into which those that are there move."""
        before = self._images
        if before.dim() == 4:
            height, width = max(height, before.shape[-2]), max(width, before.shape[-1])
            if (height, width) == before.shape[-2:]:
                return
        corners = [self._corner(size) for size in self._sizes]
        self._images = self._allocate("images", (self._count, 3, height, width))
        for index, ((left, top), (rows, columns)) in enumerate(zip(corners, self._sizes, strict=True)):
            self._place(index, before[index, :, top : top + rows, left : left + columns])

    def _place(self, index: int, image: Tensor) -> None:
        rows, columns = image.shape[-2:]
        left, top = self._corner((rows, columns))
        if (rows, columns) != self._images.shape[-2:]:
            self._images[index] = 1
        self._images[index, :, top : top + rows, left : left + columns] = image

    def _corner(self, size: tuple[int, int]) -> tuple[int, int]:
        """Left and top of a centred image of this (height, width)."""
        return (self._images.shape[-1] - size[1]) // 2, (self._images.shape[-2] - size[0]) // 2


def _in_memory(name: str, shape: tuple[int, ...]) -> Tensor:
    check_memory(shape[0], shape[2], shape[3])
    return torch.empty(shape)


def _to_width(image: Image.Image, width: int) -> Processed:
    """Resize to `width`, with the height rounded to a multiple of 14. Rows beyond a square are cut off at top and bottom."""
    height = _round_to_patch(image.height * (width / image.width), image)
    scale = _scale(image, width, height)
    if height > 8 * width:  # most of it is cut off: resample the rest alone
        start = (height - width) // 2
        pixels = _resize(image, (width, width), (0, start / scale[1], image.width, (start + width) / scale[1]))
        return Processed(pixels, (image.height, image.width), scale, (0.0, float(-start)))
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


def check_memory(frames: int, height: int, width: int) -> None:
    """InputError if `frames` frames of this size in fp32 do not fit into the free memory."""
    need, free = frames * height * width * 3 * 4, budget_of(torch.device("cpu"))
    if free is not None and need > free:
        raise InputError(
            f"{frames} frame(s) of {height} x {width} pixels need {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free: "
            "use fewer frames or a smaller size"
        )


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> NDArray[np.uint8]:
    check_memory(1, size[1], size[0])
    return np.array(image.resize(size, Image.Resampling.BICUBIC, box=box))


def _scale(image: Image.Image, width: int, height: int) -> tuple[float, float]:
    return width / image.width, height / image.height
