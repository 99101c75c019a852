"""The pictures that frames were made from, at their own size: what is shown to tools that want more pixels than the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from ..errors import InputError
from .frames import Frames
from .images import Page, is_image, is_plain, read
from .preprocess import to_rgb
from .video import decode


def each_original(frames: Frames, use: Callable[[int, Image.Image], object], chosen: Sequence[int] | None = None) -> None:
    """Call `use(index, picture)` for each chosen frame, or all, with its picture upright, in 8-bit RGB and at its original size.

    They come in order, one in memory at a time. A video is decoded once. Frames made in memory are their own originals.

    Raises:
        InputError: a file is missing or has changed since it was read, or frames made in memory were resized.
    """
    left = list(range(len(frames)) if chosen is None else chosen)[::-1]

    def take(picture: Image.Image) -> None:
        index = left[-1]
        if picture.size[::-1] != tuple(frames.original_sizes[index]):
            raise InputError(f"the picture of frame {frames.names[index]!r} has another size than when it was read: run it again")
        use(index, to_rgb(picture))
        left.pop()

    if not frames.pages:
        if (frames.scale != 1).any() or frames.offset.any():
            raise InputError("these frames were made in memory and resized, so their original pictures are unknown: read them from files")
        for index in left[::-1]:
            pixels = (frames.images[index].permute(1, 2, 0).cpu().clamp(0, 1) * 255 + 0.5).byte().numpy()
            take(Image.fromarray(pixels))
        return
    pages = [frames.pages[index] for index in left[::-1]]
    if pages and is_image(pages[0].path):
        for page in pages:
            read(page, take, frames.shown)
    elif pages:
        decode(pages[0].path, [page.index for page in pages], take, lambda: None, quiet=True)
    if left:
        raise InputError(f"the picture of frame {frames.names[left[-1]]!r} cannot be read any more: run it again")


def linkable(page: Page) -> bool:
    """Whether every tool reads this file as it was read here: a JPEG or PNG of 8 bits, upright and opaque, with one picture."""
    return page.index == 0 and is_image(page.path) and is_plain(page.path)
