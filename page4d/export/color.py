"""Colours: 8-bit images, the colour map, and distinct colours by index."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from numpy.typing import NDArray

# From far and cool to near and warm: deep blue, blue, teal, green, yellow, orange, red; evenly spaced on [0, 1].
_STOPS = np.array(
    [(38, 24, 78), (54, 74, 168), (38, 138, 200), (46, 190, 150), (150, 220, 78), (244, 214, 66), (246, 140, 40), (204, 44, 26)], float
)


def colormap(values: NDArray[Any]) -> NDArray[np.uint8]:
    """RGB (..., 3) uint8 for values (...), which are clipped to [0, 1]; grey where not finite."""
    known = np.isfinite(values)
    position = np.where(known, values, 0).clip(0, 1) * (len(_STOPS) - 1)
    grid = np.arange(len(_STOPS))
    rgb = np.stack([np.interp(position, grid, _STOPS[:, channel]) for channel in range(3)], -1)
    rgb[~known] = 128
    return (rgb + 0.5).astype(np.uint8)


def to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert [0, 1] to 0..255 (uint8), rounded and clipped. NaN becomes 0."""
    return (np.nan_to_num(images).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def distinct(index: int) -> tuple[int, int, int]:
    """A bright RGB colour for an index. Golden-ratio steps in hue keep neighbouring indices apart."""
    r, g, b = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 1.0)
    return round(r * 255), round(g * 255), round(b * 255)
