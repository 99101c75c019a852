"""Pictures of more than 8 bits: which part of their range is shown in 8 bits.

Pillow keeps greys of 16 and 32 bits and fractions, but has no colours of more than 8 bits: 16-bit colours are decoded by FFmpeg.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError

FULL = (0.0, 65535.0)
PERCENTILES = (0.1, 99.9)  # without dead and hot pixels
TIFF_BITS, TIFF_FORMAT = 258, 339  # tags; format 1 is unsigned, which Pillow reads as signed
RULES = ("auto", "full")

Range = tuple[float, float]  # shown as black and white

log = logging.getLogger(__name__)


def is_deep(image: Image.Image, page: int = 0) -> bool:
    """Whether a picture has more than 8 bits per channel, from its header. Colours of further pages count as 8 bits."""
    return image.mode == "F" or image.mode.startswith("I") or (page == 0 and _is_deep_color(image))


def values(image: Image.Image, path: Path) -> NDArray[Any]:
    """Greys (H, W) or colours (H, W, 3) of a deep picture, as stored in the file."""
    if image.mode == "RGB":
        return _color_values(path)
    greys = np.asarray(image.copy())  # a copy as in `images.read`
    bits, kind = (getattr(image, "tag_v2", {}).get(tag, (0,)) for tag in (TIFF_BITS, TIFF_FORMAT))
    return greys.view(np.uint32) if greys.dtype == np.int32 and bits == (32,) and kind == (1,) else greys


def shown_range(pictures: Iterable[NDArray[Any]], rule: str) -> Range:
    """The range of values that becomes black to white, the same for all pictures of a clip.

    "full" is 0 to 65535. "auto" is full too, unless the pictures hold other values, or use less than half of them. Then it is from the
    smallest 0.1 percentile to the largest 99.9 percentile of a picture.

    Raises:
        InputError: values outside of 0 to 65535 or fractions with "full"; or there is no range, as all values are one.
    """
    low, high, least, most, fractions = np.inf, -np.inf, np.inf, -np.inf, False
    for picture in pictures:
        known = picture[np.isfinite(picture)]
        if known.size:
            first, last = np.percentile(known, PERCENTILES)
            low, high = min(low, float(first)), max(high, float(last))
            least, most = min(least, float(known.min())), max(most, float(known.max()))
        fractions |= picture.dtype.kind == "f"
    if most < least:
        if fractions:
            raise InputError("none of its values is finite: there is nothing to show")
        return FULL  # no deep picture
    usual = not fractions and least >= FULL[0] and most <= FULL[1]
    if rule == "full" and not usual:
        raise InputError(
            "its grey values are fractions or have more than 16 bits: use the value range 'auto', or convert it to 8 or 16 bit"
        )
    if rule == "full" or (usual and (high - low >= (FULL[1] - FULL[0]) / 2 or high <= low)):
        return FULL
    if not high > low:
        raise InputError(f"its grey values are all {most:g}, which has no known range: convert it to 8 or 16 bit first")
    log.warning("values from %g to %g are stretched from black to white (--range full: 0 to 65535)", low, high)
    return low, high


def to_8_bit(picture: NDArray[Any], shown: Range = FULL) -> NDArray[np.uint8]:
    """Values as 8 bits: round(255 (v - low) / (high - low)), clipped. What is not finite is black."""
    low, high = shown
    scaled = (picture.astype(np.float64) - low) * (255 / (high - low))
    return np.floor(np.nan_to_num(scaled, nan=0.0).clip(0, 255) + 0.5).astype(np.uint8)


def _is_deep_color(image: Image.Image) -> bool:
    tiles = getattr(image, "tile", [])  # how the file stores the pixels
    if image.mode != "RGB" or image.format not in ("PNG", "TIFF") or not tiles:
        return False
    arguments = tiles[0][3]
    raw = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
    return isinstance(raw, str) and ";16" in raw


def _color_values(path: Path) -> NDArray[Any]:
    import av

    # An open file, because FFmpeg takes a name with '%d' for a series of files.
    with open(path, "rb") as file, av.open(file, "r") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb48le")
