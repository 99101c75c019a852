"""Output files that appear whole, all together, or not at all."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class AtomicFiles:
    """`with AtomicFiles() as files: write(files.add(path))`: writes go to temporary names beside the final ones.

    All are renamed when the block ends; if it raises, the temporary files and the folders made for them are removed.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Path, Path]] = []
        self._folders: list[Path] = []

    @property
    def paths(self) -> list[Path]:
        """The final names, in the order they were added."""
        return [final for _, final in self._pending]

    def add(self, path: Path) -> Path:
        """The temporary name to write `path` under; it keeps the suffix, from which libraries infer the format."""
        missing = [folder for folder in path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._folders.append(folder)
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
        self._pending.append((temporary, path))
        return temporary

    def __enter__(self) -> AtomicFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            for temporary, final in self._pending:
                os.replace(temporary, final)
            return
        for temporary, _ in self._pending:
            temporary.unlink(missing_ok=True)
        for folder in reversed(self._folders):
            with suppress(OSError):  # somebody else may have put something there
                folder.rmdir()
