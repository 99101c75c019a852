"""The pictures that frames were made from, at their own size: what is shown to tools that want more pixels than the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from ..errors import InputError
from .frames import Frames
from .images import Page, is_image, plain_suffix, read_all
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
        check_original(frames, index, picture.size)
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
        for _ in read_all(pages, take, frames.shown):
            pass
    elif pages:
        decode(pages[0].path, [page.index for page in pages], take, lambda: None, quiet=True)
    if left:
        raise InputError(f"the picture of frame {frames.names[left[-1]]!r} cannot be read any more: run it again")


def check_original(frames: Frames, index: int, size: tuple[int, int]) -> None:
    """InputError unless the picture of a frame still has the (width, height) that it was read with."""
    if size[::-1] != tuple(frames.original_sizes[index]):
        raise InputError(f"the picture of frame {frames.names[index]!r} has another size than when it was read: run it again")


def link_suffix(page: Page) -> str:
    """The suffix of a link to this file, if every tool reads it as it was read here: see `plain_suffix`. Else empty."""
    return plain_suffix(page.path) if page.index == 0 and is_image(page.path) else ""
