"""What earlier exports wrote into a folder, so that a later one leaves none of their files beside its own."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..files import AtomicFiles

NAME = "manifest.json"

Marks = dict[str, list[int]]  # [bytes, mtime in ns] by path in the output folder

log = logging.getLogger(__name__)


class Manifest:
    """The files of each format in an output folder, kept in the file `manifest.json`: {"files": {format: {path: [bytes, mtime in ns]}}}.

    A file is ours as long as its size and time are those that were written down. Whatever the user put there or changed stays, unless a
    file of the same name is written: then a warning says so.
    """

    def __init__(self, out_dir: Path):
        self._folder = out_dir
        self._files: dict[str, dict[str, list[int]]] = {}
        with suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):  # none yet, or not one of ours
            found = json.loads((out_dir / NAME).read_text(encoding="utf-8"))["files"]
            self._files = {str(name): {str(path): list(mark) for path, mark in files.items()} for name, files in found.items()}

    def has(self, name: str) -> bool:
        """Whether an earlier run left files of this format."""
        return name in self._files

    def replace(self, name: str, written: list[Path], before: Marks) -> None:
        """Note the files of a format that were just written, and remove those of earlier exports of that format.

        `before` are the files that were there before.
        """
        marks = {path.relative_to(self._folder).as_posix(): _mark(path) for path in written}
        ours = {path: mark for files in self._files.values() for path, mark in files.items()}
        lost = [path for path in marks if path in before and before[path] != ours.get(path)]
        if lost:
            words = "%s: %d file(s) that no earlier run left as they were have been replaced, such as %s"
            log.warning(words, self._folder, len(lost), lost[0])
        changed = []
        for relative, mark in self._files.get(name, {}).items():
            path = self._folder / relative
            if relative in marks or ".." in path.parts or Path(relative).is_absolute() or not os.path.lexists(path):
                continue
            if _mark(path) == mark:
                path.unlink()
                with suppress(OSError):  # not empty
                    path.parent.rmdir()
            else:
                changed.append(relative)
        if changed:
            log.warning("%s: %d file(s) of an earlier run were changed since and stay, such as %s", self._folder, len(changed), changed[0])
        self._files[name] = marks
        with AtomicFiles() as files:
            text = json.dumps({"files": self._files}, indent=1)
            files.add(self._folder / NAME).write_text(text + "\n", encoding="utf-8")

    def report(self, names: list[str]) -> None:
        """Say which formats of earlier exports are still in the folder."""
        old = [name for name in self._files if name not in names and any((self._folder / path).is_file() for path in self._files[name])]
        if old:
            log.warning("%s: still holds %s of an earlier run, perhaps of other pictures", self._folder, ", ".join(old))


def marks(out_dir: Path, folders: Sequence[str]) -> Marks:
    """The files in some folders of an output folder."""
    found = {}
    for folder in folders:
        with suppress(OSError):  # there is none
            for entry in os.scandir(out_dir / folder):
                if not entry.is_dir(follow_symlinks=False):
                    found[Path(folder, entry.name).as_posix()] = _mark(Path(entry.path))
    return found


def _mark(path: Path) -> list[int]:
    status = path.lstat()  # of a link itself, not of what it leads to
    return [status.st_size, status.st_mtime_ns]
