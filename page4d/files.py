"""Output files that are written atomically: all of them or none."""

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

Allocate = Callable[[str, tuple[int, ...]], Tensor]  # allocate(name, shape) -> an uninitialised fp32 tensor


class AtomicFiles:
    """Write several files atomically: `with AtomicFiles() as files: write(files.add(path))`.

    Files are written under temporary names in the folder of the final ones, and renamed when the block ends. If the block raises, the
    temporary files and the folders created for them are removed.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Path, Path]] = []
        self._folders: list[Path] = []

    @property
    def paths(self) -> list[Path]:
        """The final paths, in the order in which they were added."""
        return [final for _, final in self._pending]

    def add(self, path: Path) -> Path:
        """The temporary path to write instead of `path`. It has the same suffix, from which libraries infer the format."""
        if path in self.paths:
            raise ValueError(f"{str(path)!r} would be written twice")
        missing = [folder for folder in path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._folders.append(folder)
        if path.is_dir():  # otherwise the rename would fail after other files are in place
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        temporary = path.with_name(f".{uuid.uuid4().hex[:8]}{path.suffix}")
        self._pending.append((temporary, path))
        return temporary

    def discard(self) -> None:
        """Remove the remaining temporary files and the folders created for them, as far as possible."""
        for temporary, _ in self._pending:
            with suppress(OSError):
                temporary.unlink()
        for folder in reversed(self._folders):
            with suppress(OSError):  # another process may have written into it
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
        if isinstance(error, OSError):  # report the final name, which the user knows
            for temporary, final in self._pending:
                if str(error.filename) == str(temporary):
                    error.filename = str(final)


def on_disk(folder: Path) -> Allocate:
    """A function (name, shape) -> fp32 tensor whose memory is an unnamed file in `folder`, for results larger than the memory.

    The file is deleted with the last reference to the tensor. Where such files are not supported, the tensors are ordinary ones. The
    function raises InputError if the disk has no space left.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())

    def allocate(name: str, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if not hasattr(os, "posix_fallocate"):
            return torch.empty(shape)
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, 4 * count)  # a full disk fails here, not with a signal later
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # the file system cannot reserve space
                    return torch.empty(shape)
                raise InputError(
                    f"{existing} has no room for {name}, {4 * count / 1e9:.1f} GB ({error.strerror}): make room, or choose another --out"
                ) from None
            return torch.from_file(file.name, shared=True, size=count).view(shape)

    return allocate


def check_writable(out_dir: Path) -> None:
    """Raise InputError unless files can be written into `out_dir`, which need not exist. Leaves no files or folders behind."""
    files = AtomicFiles()
    try:
        files.add(out_dir / "probe").write_bytes(b"probe")
    except OSError as error:
        raise InputError(f"cannot write into the folder {str(out_dir)!r} ({error.strerror}): choose another output folder") from error
    finally:
        files.discard()
