"""What an input names: one video, or the pictures to read, in order. What is not read is said."""

from __future__ import annotations

import glob
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .images import IMAGE_SUFFIXES, is_image, natural
from .posed import Posed, check_pictures, locate, read_posed

VIDEO_SUFFIXES = {".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".mts", ".m2ts", ".ts"}
NOT_READ = {  # pictures and videos that a folder may hold beside those that are read
    *(".jxl", ".jp2", ".j2k", ".exr", ".hdr", ".tga", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *VIDEO_SUFFIXES,
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The files to read: one video, or images in order."""

    paths: list[Path]
    posed: list[Posed] | None = None  # the camera of each image, where these are known
    cameras: Path | None = None  # the transforms.json or the folder of the model that says them


def resolve(inputs: Sequence[str | Path]) -> Source:
    """Find what the inputs name.

    Raises:
        InputError: an input is empty, a URL, missing, or neither a file nor a folder; or there is nothing to read; or cameras are damaged.
    """
    if isinstance(inputs, (str, bytes, os.PathLike)):
        inputs = [inputs]
    if not isinstance(inputs, Iterable) or not all(isinstance(entry, (str, bytes, os.PathLike)) for entry in inputs):
        raise InputError(f"inputs must be paths, not {inputs!r:.60}")
    paths = [path for entry in inputs for path in _expand(entry)]
    if not paths:
        raise InputError("nothing to read: give a video, a folder of images or image files")
    if len(paths) == 1:
        if locate(paths[0]):
            return _posed(paths[0])
        return Source(list_folder(paths[0]) if paths[0].is_dir() else paths)
    for path in paths:
        if locate(path):
            raise InputError(f"{str(path)!r} brings its own pictures and cameras, so it cannot be mixed with other inputs: give it alone")
        if path.is_dir() or not is_image(path):
            raise InputError(f"{str(path)!r} is not an image file: give one video, one folder, or image files only")
    return Source(paths)


def _posed(path: Path) -> Source:
    try:
        posed = read_posed(path)
    except InputError as error:
        pictures = path.is_dir() and any(is_image(path / name) for name in os.listdir(path))
        advice = f"; to read its pictures without cameras, give {str(path / '*')!r}" if pictures else ""
        raise InputError(f"{error}{advice}") from error
    check_pictures(posed, path)
    return Source([each.image for each in posed], posed, locate(path))


def _expand(entry: str | Path) -> list[Path]:
    """The paths that one input names: itself, or the matches of a pattern that the shell has left alone, in natural order."""
    text = os.fsdecode(entry)
    if not text.strip():
        raise InputError("an input is empty: give a video, a folder of images or image files")
    try:
        path = Path(text).expanduser()
        if os.path.exists(path):
            _check_kind(path)
            return [path]
        found = glob.glob(str(path), recursive=True) if glob.has_magic(text) else []
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, or an unknown home folder
        raise InputError(f"{text!r} is not a usable path ({error}): check it") from error
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise InputError(f"{text!r} is a URL, not a path: download it first")
    if found:
        matches = sorted(map(Path, found), key=_natural)
        return [match for match in matches if match.is_file()] or matches
    if os.path.islink(path):
        raise InputError(f"{text!r} is a link to {os.readlink(path)!r}, which does not exist")
    raise InputError(
        f"{text!r} does not exist" + (", and no file matches it as a pattern" if glob.has_magic(text) else "") + ": check the path"
    )


def _check_kind(path: Path) -> None:
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise InputError(f"{str(path)!r} is {kind}, not a file: save what it gives to a file first")


def list_folder(folder: Path) -> list[Path]:
    """The images of a folder, in natural order. One warning says which pictures and videos in it are not read."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot open the folder {str(folder)!r} ({error.strerror}): check its permissions") from error
    images, left, folders = [], Counter[str](), 0
    for name in names:
        path, suffix = folder / name, Path(name).suffix.lower()
        if os.path.isdir(path):
            folders += 1
        if suffix in IMAGE_SUFFIXES and os.path.isfile(path):
            images.append(path)
        elif suffix in IMAGE_SUFFIXES:
            problem = "is a folder" if os.path.isdir(path) else "is a dangling link" if os.path.islink(path) else "is no regular file"
            log.warning("%s: left out, as it %s", path, problem)
        elif suffix in NOT_READ:
            left[suffix] += 1
    listing = ", ".join(f"{count} {suffix}" for suffix, count in left.items())
    if not images:
        raise _no_images(folder, names, listing, folders)
    if left:
        log.warning("%s: not read are %s (only images of a folder are read)", folder, listing)
    return sorted(images, key=_natural)


def _no_images(folder: Path, names: list[str], listing: str, folders: int) -> InputError:
    """What a folder has instead of images, and what to do."""
    videos = sorted((folder / name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES), key=_natural)
    if videos:
        count, advice = (f"{len(videos)} videos", "give one of them, such as") if len(videos) > 1 else ("a video", "give")
        return InputError(f"the folder {str(folder)!r} holds {count} and no images: {advice} {str(videos[0])!r}")
    known = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
    instead = f" ({listing} are not read)" if listing else ""
    below = "; folders in it are not searched" if folders else ""
    return InputError(f"no images in the folder {str(folder)!r}{instead}: it should hold files of the types {known}{below}")


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """A sort key: the name in natural order. The path itself breaks ties such as 1 and 01."""
    return natural(path.name), str(path)
