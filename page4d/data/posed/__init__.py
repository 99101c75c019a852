"""Pictures whose cameras are known already: COLMAP models and transforms.json."""

from __future__ import annotations

import logging
import os
from collections import Counter
from itertools import islice
from pathlib import Path

from ...errors import InputError
from ..images import IMAGE_SUFFIXES, is_image, natural
from . import colmap, transforms
from .camera import Posed, about, check_present

__all__ = ["Posed", "about", "check_pictures", "locate", "read_posed"]

MODELS = ("", "0", "sparse/0", "sparse", "colmap/sparse/0")  # where a folder may have its COLMAP model

log = logging.getLogger(__name__)


def locate(path: str | Path) -> Path | None:
    """The transforms.json or the COLMAP model folder that a path stands for. None if it is neither and holds neither."""
    path = Path(path)
    if os.path.isfile(path):  # unlike Path.is_file, no error without permission
        return path if path.suffix.lower() == ".json" else None
    if os.path.isfile(path / "transforms.json"):
        return path / "transforms.json"
    return next((path / below for below in MODELS if colmap.is_model(path / below)), None)


def read_posed(path: str | Path) -> list[Posed]:
    """The cameras of a COLMAP model or a transforms.json, in natural order of the pictures' names. The pictures need not be there.

    Args:
        path: a model folder, a transforms.json, or a folder that holds one of them (docs/inputs.md).

    Raises:
        InputError: there are no cameras, or they cannot be used. The message names the file.
    """
    source = locate(path)
    if source is None:
        raise InputError(f"{str(path)!r} has no cameras: give a COLMAP model folder or a transforms.json")
    found = colmap.read(source) if source.is_dir() else transforms.read(source)
    if not found:
        raise InputError(f"{str(source)!r} lists no pictures: export the cameras again")
    name, count = Counter(posed.name for posed in found).most_common(1)[0]
    if count > 1:
        raise InputError(f"{str(source)!r} lists the picture {name!r} {count} times: remove all but one")
    return sorted(found, key=lambda posed: (natural(posed.name), posed.name))


def check_pictures(found: list[Posed], path: str | Path) -> None:
    """Look for the pictures of what `read_posed` found. One warning counts pictures beside them that have no camera.

    Raises:
        InputError: pictures are missing, or one is not an image file.
    """
    source = locate(path) or Path(path)
    check_present([posed.image for posed in found], source)
    for posed in found:
        if not is_image(posed.image):
            raise InputError(f"{str(source)!r} lists {str(posed.image)!r}, which is not an image file: give pictures")
    listed = {os.path.realpath(posed.image) for posed in found}
    left = sum(path not in listed for path in _beside(found, source))
    if left:
        log.warning("%s: pictures in the same folders that have no camera are left out (%d)", source, left)


def _beside(found: list[Posed], source: Path) -> set[str]:
    """All pictures in the folders of those that were found, and anywhere below the folder `images` of a COLMAP model."""
    folders = {os.path.realpath(posed.image.parent) for posed in found}
    listings = [listing for folder in folders for listing in islice(os.walk(folder), 1)]
    if source.is_dir() and (images := colmap.pictures_folder(source)).name == "images":
        listings += os.walk(os.path.realpath(images))
    files = [(folder, name) for folder, _, names in listings for name in names if not name.startswith(".")]
    return {os.path.realpath(os.path.join(folder, name)) for folder, name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES}
