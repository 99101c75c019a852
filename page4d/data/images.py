"""Image files: their types, their pages, and each page as an upright picture."""

from __future__ import annotations

import importlib
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray
from PIL import Image, features

from ..errors import InputError
from . import deep
from .orientation import EXIF_ORIENTATION, UPRIGHT, upright

HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".pgm", ".ppm", ".pnm"),
    *HEIF_SUFFIXES,
}
ANIMATED_FORMATS = {"PNG", "WEBP", "GIF", "AVIF"}
NEVER_DEEP = {"GIF", "WEBP", "JPEG", "MPO", "BMP"}  # have 8 bits per channel
SINGLE = (b"\xff\xd8\xff", b"BM", b"P5", b"P6")  # JPEG, BMP and PPM hold one picture, and perhaps previews
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis"}
PNG = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
TIFF_KIND, TIFF_REDUCED, TIFF_MASK = 254, 1, 4  # the tag NewSubfileType, and its bits for previews and masks
TIFF_WIDTH, TIFF_HEIGHT = 256, 257  # tags of the size as it is stored

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """One picture of an image file."""

    path: Path
    index: int = 0  # in the file


def is_image(path: Path) -> bool:
    """Whether the suffix says so, or else the first bytes. Everything else is given to the video decoder."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    known = (b"\xff\xd8\xff", PNG, b"II*\0", b"MM\0*")
    return start.startswith(known) or _is_heif(start) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts image2 before image10."""
    parts = re.split(r"(\d+)", name.lower())
    digits = [part.lstrip("0") for part in parts]  # the longer is the larger; int() refuses thousands of digits
    return [(len(digits[i]), digits[i]) if i % 2 else (-1, part) for i, part in enumerate(parts)]


def pages(path: Path) -> list[Page]:
    """The pages of a file that are pictures of their own: not previews, masks, or the still that stands for an animation.

    A file that cannot be opened counts as one page: reading it gives the reason.
    """
    try:
        with open(path, "rb") as file:
            if file.read(3).startswith(SINGLE):
                return [Page(path)]
        with _opened(path) as image:
            count = getattr(image, "n_frames", 1)
            if count > 1 and image.format == "TIFF":
                return [Page(path, i) for i in range(count) if i == 0 or _is_tiff_page(image, i)]
            if image.format in ANIMATED_FORMATS:
                return [Page(path, i) for i in range(int(count > 1 and image.info.get("default_image", False)), count)]
    except Exception:  # whatever Pillow raises for a damaged file
        pass
    return [Page(path)]


def stored_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels by the header, before the picture is turned upright."""
    with _opened(path) as image:
        tags = getattr(image, "tag_v2", {})  # Pillow turns the size of a TIFF
        return (tags[TIFF_WIDTH], tags[TIFF_HEIGHT]) if image.format == "TIFF" else image.size


def stored_orientation(page: Page) -> int:
    """The EXIF orientation by which `read` turns a page upright."""
    with _page(page) as image:
        return _take_orientation(image, page.path)


PLAIN = {"JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",)}  # suffixes that tools know, the first as the usual one


def plain_suffix(path: Path) -> str:
    """The suffix of a file that every tool reads as `read` does: a JPEG or PNG in 8-bit RGB, upright and opaque, with one picture.

    A file with another suffix has that of its format. Empty for all other files.
    """
    try:
        with _opened(path) as image:
            known = PLAIN.get(image.format or "", ())
            several = image.format == "PNG" and getattr(image, "n_frames", 1) > 1
            if not known or several or image.mode != "RGB" or image.has_transparency_data or deep.is_deep(image):
                return ""
            return "" if _take_orientation(image, path) != UPRIGHT else path.suffix if path.suffix.lower() in known else known[0]
    except InputError:
        return ""


def _is_tiff_page(image: Image.Image, index: int) -> bool:
    image.seek(index)
    kind = image.tag_v2.get(TIFF_KIND, 0)  # type: ignore[attr-defined]
    return not (isinstance(kind, int) and kind & (TIFF_REDUCED | TIFF_MASK))


def times(found: list[Page]) -> list[float] | None:
    """Seconds from the first page of an animation to each of its pages. None if the file has no times, as a TIFF."""
    result, now = [], 0.0
    with _opened(found[0].path) as image, _decoding(found[0].path):
        for page in found:
            image.seek(page.index)
            image.load()  # WebP and AVIF know the duration afterwards
            result.append(now)
            duration = image.info.get("duration")
            if not isinstance(duration, (int, float)):
                return None
            now += duration / 1000
    return result if now else None


def shown_range(found: list[Page], rule: str) -> deep.Range:
    """The range of values that all pictures of more than 8 bits share, see `deep.shown_range`. Other pictures are not decoded.

    Raises:
        InputError: as `deep.shown_range`. The message names the first such file.
    """
    names = []

    def pictures() -> Iterator[NDArray[Any]]:
        for path, group in groupby(found, lambda page: page.path):
            with suppress(InputError), _opened(path) as image:  # `read` will report it
                for page in group:
                    if image.format in NEVER_DEEP:
                        break
                    _turn_to(image, page)
                    if deep.is_deep(image, page.index):
                        names.append(path)
                        yield _values(image, page)

    try:
        return deep.shown_range(pictures(), rule)
    except InputError as error:
        raise InputError(f"{str(names[0])!r}: {error}") from error


def read(page: Page, convert: Callable[[Image.Image], T], shown: deep.Range = deep.FULL) -> T:
    """`convert(image)` of one page, as `read_all` reads it."""
    return next(read_all([page], convert, shown))


def read_all(found: Sequence[Page], convert: Callable[[Image.Image], T], shown: deep.Range = deep.FULL) -> Iterator[T]:
    """`convert(image)` of each page, turned upright by its EXIF orientation, with 8 bits per channel.

    The pages of an animation are read from one open file, as each builds on those before it.

    Raises:
        InputError: a file is not an image or is damaged, or `convert` raises it. The message names the file.
    """
    for path, group in groupby(found, lambda page: page.path):
        several = list(group)
        while several:
            with _opened(path) as image:
                together = len(several) if image.format in ANIMATED_FORMATS else 1  # pages of a TIFF have their own orientation
                orientation: int | None = None
                for page in several[:together]:
                    _turn_to(image, page)
                    is_deep = deep.is_deep(image, page.index)  # by the header, which decoding uses up
                    orientation = _take_orientation(image, path) if orientation is None else orientation
                    yield _converted(image, page, is_deep, orientation, convert, shown)
            several = several[together:]


def _converted(
    image: Image.Image, page: Page, is_deep: bool, orientation: int, convert: Callable[[Image.Image], T], shown: deep.Range
) -> T:
    if is_deep:
        picture = Image.fromarray(deep.to_8_bit(_values(image, page), shown))
    else:
        with _decoding(page.path):
            picture = image.copy()  # whose size is that of its pixels: that of a TIFF is already turned
    try:
        return convert(upright(picture, orientation))
    except InputError as error:
        raise InputError(f"{str(page.path)!r}: {error}") from error


def _values(image: Image.Image, page: Page) -> NDArray[Any]:
    with _decoding(page.path):
        return deep.values(image, page.path)


@contextmanager
def _page(page: Page) -> Iterator[Image.Image]:
    with _opened(page.path) as image:
        _turn_to(image, page)
        yield image


def _turn_to(image: Image.Image, page: Page) -> None:
    with _decoding(page.path):
        image.seek(page.index)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Without Pillow's warnings, of metadata that is wrong or of very large pictures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Whatever a decoder raises for a damaged file becomes one clear line."""
    try:
        with _no_warnings():
            yield
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{str(path)!r} is not an image that can be read: remove it or copy it again") from error
    except Exception as error:
        raise InputError(f"cannot read the image {str(path)!r} ({error or type(error).__name__}): remove it or copy it again") from error


def _take_orientation(image: Image.Image, path: Path) -> int:
    """Remove and return the EXIF tag Orientation. All other tags are left alone. Metadata that cannot be read is no orientation.

    It is removed because Pillow turns some TIFFs itself while it decodes them, and others not.
    """
    try:
        with _no_warnings():
            for name in ("xmp", "XML:com.adobe.xmp"):  # which Pillow takes for EXIF where there is none
                image.info.pop(name, None)
            exif = image.getexif()
            value = exif.get(EXIF_ORIENTATION, UPRIGHT)
            if EXIF_ORIENTATION in exif:
                del exif[EXIF_ORIENTATION]
    except Exception as error:
        log.warning("%s: its EXIF metadata cannot be read (%s), the picture is taken as it is stored", path, type(error).__name__)
        return UPRIGHT
    return value if isinstance(value, int) else UPRIGHT


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file opened by Pillow, which has read its header alone. Failures are one clear line.

    Pillow gets an open file, not a name: by name it maps TIFFs into memory, those that stand on their side in wrong rows.
    """
    with ExitStack() as stack:
        with _decoding(path):
            file = stack.enter_context(open(path, "rb"))
            start = file.read(64)
            file.seek(0)
            if _is_heif(start):
                _need_heif(path, start)
            try:
                image = Image.open(file)
            except Exception:
                if not start.startswith(PNG):
                    raise
                image = Image.open(_without_metadata(path))
            stack.enter_context(image)
        yield image


def _without_metadata(path: Path) -> io.BytesIO:
    """A PNG without the chunks that do not change its pixels. Pillow refuses files for texts that are damaged or too long."""
    data = path.read_bytes()
    kept, place = [PNG], len(PNG)
    while place + 12 <= len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        chunk = data[place : place + 12 + size]
        whole = len(chunk) == 12 + size and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind in PIXEL_CHUNKS or (kind == b"eXIf" and whole):
            kept.append(chunk)
        place += 12 + size
    return io.BytesIO(b"".join(kept))


def _is_heif(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


def _need_heif(path: Path, start: bytes) -> None:
    """Register the package that reads HEIC. InputError if there is none, or if Pillow is too old for AVIF."""
    if b"avif" in start[8:] or b"avis" in start[8:]:  # the main brand or a compatible one
        if not features.check("avif"):
            raise InputError(f"{str(path)!r} is an AVIF image, which needs Pillow 11.3 or newer: update it, or convert the image to PNG")
        return
    for name in ("pillow_heif", "pi_heif"):
        try:
            importlib.import_module(name).register_heif_opener()
            return
        except ImportError:
            continue
    raise InputError(f"{str(path)!r} is an HEIC image, which needs the package pi-heif: pip install pi-heif, or convert it to JPEG or PNG")
