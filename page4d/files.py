"""Output files that appear whole, all together, or not at all."""

from __future__ import annotations

import errno
import math
import os
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .errors import InputError


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
        if path in self.paths:
            raise ValueError(f"{str(path)!r} would be written twice")
        missing = [folder for folder in path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._folders.append(folder)
        if path.is_dir():  # renaming would find out too late, with other files already in place
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        temporary = path.with_name(f".{uuid.uuid4().hex[:8]}{path.suffix}")
        self._pending.append((temporary, path))
        return temporary

    def discard(self) -> None:
        """Remove the temporary files that are left and the folders made for them, as far as possible."""
        for temporary, _ in self._pending:
            with suppress(OSError):
                temporary.unlink()
        for folder in reversed(self._folders):
            with suppress(OSError):  # somebody else may have put something there
                folder.rmdir()

    def __enter__(self) -> AtomicFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            try:
                for temporary, final in self._pending:
                    os.replace(temporary, final)
            except BaseException:
                self.discard()
                raise
            return
        self.discard()
        if isinstance(error, OSError):  # the user knows the file by its final name
            for temporary, final in self._pending:
                if str(error.filename) == str(temporary):
                    error.filename = str(final)


def on_disk(folder: Path) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Makes fp32 tensors in memory that files without a name in `folder` back, so that results larger than the memory can be had.

    They are gone with their last reference. Where files cannot be set up so, the tensors are ordinary ones.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())

    def allocate(name: str, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if not hasattr(os, "posix_fallocate"):
            return torch.empty(shape)
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, 4 * count)  # a disk that is full says so now, not by a signal later
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # this file system cannot promise room
                    return torch.empty(shape)
                raise InputError(
                    f"{existing} has no room for {name}, {4 * count / 1e9:.1f} GB ({error.strerror}): choose another --out"
                ) from None
            return torch.from_file(file.name, shared=True, size=count).view(shape)

    return allocate


def check_writable(out_dir: Path) -> None:
    """InputError unless files can be written into `out_dir`, made if need be. Leaves nothing behind, no new folder either."""
    files = AtomicFiles()
    try:
        files.add(out_dir / "probe").write_bytes(b"probe")
    except OSError as error:
        raise InputError(f"cannot write into the folder {str(out_dir)!r} ({error.strerror}): choose another output folder") from error
    finally:
        files.discard()
