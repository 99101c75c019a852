"""Textures that tile: noise with the spectrum of natural images, patterns, and optional photographs.

Textures are stored as mipmaps: level l has every texture at 1/2^l of the size, so that distant surfaces do not flicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ...errors import InputError

SIZE = 128  # side of the finest level in texels
LEVELS = 6
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Textures:
    """The mipmaps of T = `count` textures."""

    texels: Tensor  # (sum over levels of T * side^2, 3): level after level
    count: int

    def __call__(self, index: Tensor, u: Tensor, v: Tensor, level: Tensor) -> Tensor:
        """Colours (P, 3) in [0, 1] of textures `index` (P,) at u, v (P,) in units of a tile: bilinear, on the nearest `level` (P,)."""
        level = level.round().clamp(0, LEVELS - 1).long()
        side = SIZE >> level
        # number of texels before this level: T * SIZE^2 * (1 + 1/4 + ...)
        start = (self.count * (SIZE * SIZE * 4 - 4 * side * side) // 3) + index * side * side
        x, y = (u - u.floor()) * side - 0.5, (v - v.floor()) * side - 0.5
        x0, y0 = x.floor(), y.floor()
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        x0, y0 = x0.long() % side, y0.long() % side
        x1, y1 = (x0 + 1) % side, (y0 + 1) % side
        row0, row1 = start + y0 * side, start + y1 * side
        upper = self.texels[row0 + x0] * (1 - fx) + self.texels[row0 + x1] * fx
        lower = self.texels[row1 + x0] * (1 - fx) + self.texels[row1 + x1] * fx
        return upper * (1 - fy) + lower * fy

    def to(self, device: torch.device | str) -> Textures:
        return Textures(self.texels.to(device), self.count)


def make_textures(count: int, generator: torch.Generator, photographs: Sequence[Path] | None = None) -> Textures:
    """`count` random textures. With photographs, half of them are random crops of these."""
    finest = []
    for i in range(count):
        if photographs and i % 2 == 0:
            path = photographs[int(torch.randint(len(photographs), (), generator=generator))]
            finest.append(_photograph(path, generator))
        else:
            finest.append(_procedural(generator))
    level = torch.stack(finest)
    pyramid = []
    for _ in range(LEVELS):
        pyramid.append(rearrange(level, "t c h w -> (t h w) c"))
        level = F.avg_pool2d(level, 2)
    return Textures(torch.cat(pyramid), count)


def photographs_in(folder: str | Path) -> list[Path]:
    """The images in a folder, for `make_textures`. InputError if there are none."""
    folder = Path(folder)
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not found:
        raise InputError(f"no photographs in {folder}: give a folder with {', '.join(SUFFIXES)} files")
    return found


def _photograph(path: Path, generator: torch.Generator) -> Tensor:
    """A random square crop (3, SIZE, SIZE), mirrored along both axes so that it tiles."""
    try:
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (int(torch.randint(extent - side + 1, (), generator=generator)) for extent in image.size)
            half = image.convert("RGB").crop((left, top, left + side, top + side)).resize((SIZE // 2, SIZE // 2))
    except OSError as error:
        raise InputError(f"{path} cannot be read as a photograph ({error}): remove it from the folder") from None
    values = torch.frombuffer(bytearray(half.tobytes()), dtype=torch.uint8)
    pixels = rearrange(values, "(h w c) -> c h w", h=SIZE // 2, c=3).float() / 255
    wide = torch.cat([pixels, pixels.flip(-1)], -1)
    return torch.cat([wide, wide.flip(-2)], -2)


def _noise(generator: torch.Generator, channels: int, exponent: float) -> Tensor:
    """Periodic noise (channels, SIZE, SIZE) with zero mean, unit variance and amplitude ~ 1 / frequency^exponent."""
    fy, fx = torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)[None, :]
    amplitude = (fx.square() + fy.square()).clamp_min(SIZE**-2.0).pow(-exponent / 2)
    amplitude[0, 0] = 0
    spectrum = torch.fft.rfft2(torch.randn(channels, SIZE, SIZE, generator=generator)) * amplitude
    field = torch.fft.irfft2(spectrum, s=(SIZE, SIZE))
    return field / field.std((-2, -1), keepdim=True)


def _procedural(generator: torch.Generator) -> Tensor:
    """A texture (3, SIZE, SIZE): a base colour, noise in brightness and hue, and sometimes a pattern in a second colour."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    colours = torch.rand(2, 3, 1, 1, generator=generator)
    grey = colours.mean(1, keepdim=True)
    base, other = 0.15 + 0.7 * (grey + uniform(0.2, 0.9) * (colours - grey))  # few natural surfaces have a pure colour
    brightness = _noise(generator, 1, uniform(0.7, 1.5))
    hue = _noise(generator, 3, uniform(1.0, 1.6))
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    cell = SIZE >> int(torch.randint(1, 4, (), generator=generator))
    bricks = ((x + (y // (cell // 2)) % 2 * (cell // 2)) % cell < cell // 8) | (y % (cell // 2) < cell // 8)
    patterns = [torch.zeros_like(x, dtype=torch.bool), (x // cell + y // cell) % 2 == 0, x % cell < cell // 2, bricks, brightness[0] > 0.5]
    pattern = patterns[int(torch.randint(len(patterns), (), generator=generator))]
    colour = torch.where(pattern, other, base)
    return (colour * (1 + uniform(0.1, 0.35) * brightness) + uniform(0.02, 0.08) * hue).clamp(0, 1)
