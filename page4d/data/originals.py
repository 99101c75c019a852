"""The pictures that frames were made from, at their own size: what is shown to tools that want more pixels than the network."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from ..errors import InputError
from .frames import Frames
from .images import Page, is_image, is_plain, read
from .preprocess import to_rgb
from .video import decode


def each_original(frames: Frames, use: Callable[[int, Image.Image], object]) -> None:
    """Call `use(index, picture)` for each frame, in order, with its picture upright, in 8-bit RGB and at its original size.

    One picture is in memory at a time. A video is decoded once. Frames made in memory are their own originals.

    Raises:
        InputError: a file is missing or has changed since it was read, or frames made in memory were resized.
    """
    index = 0

    def take(picture: Image.Image) -> None:
        nonlocal index
        if picture.size[::-1] != tuple(frames.original_sizes[index]):
            raise InputError(f"the picture of frame {frames.names[index]!r} has another size than when it was read: run it again")
        use(index, to_rgb(picture))
        index += 1

    if not frames.pages:
        if (frames.scale != 1).any() or frames.offset.any():
            raise InputError("these frames were made in memory and resized, so their original pictures are unknown: read them from files")
        for image in frames.images:
            pixels = (image.permute(1, 2, 0).cpu().clamp(0, 1) * 255 + 0.5).byte().numpy()
            take(Image.fromarray(pixels))
    elif is_image(frames.pages[0].path):
        for page in frames.pages:
            read(page, take, frames.shown)
    else:
        decode(frames.pages[0].path, [page.index for page in frames.pages], take, lambda: None, quiet=True)
    if index < len(frames):
        raise InputError(f"the picture of frame {frames.names[index]!r} cannot be read any more: run it again")


def linkable(page: Page) -> bool:
    """Whether every tool reads this file as it was read here: a JPEG or PNG of 8 bits, upright and opaque, with one picture."""
    return page.index == 0 and is_image(page.path) and is_plain(page.path)
