"""Output files that are written atomically: all of them or none."""

from __future__ import annotations

import errno
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

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
    existing = existing_folder(folder)

    def allocate(name: str, shape: tuple[int, ...]) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            if not _reserve(file.fileno(), name, math.prod(shape), existing):
                return torch.empty(shape)
            return torch.from_file(file.name, shared=True, size=math.prod(shape)).view(shape)

    return allocate


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _reserve(file: int, name: str, count: int, folder: Path) -> bool:
    """Reserve the space of so many fp32 values, as a full disk would be a signal later. False: the file system cannot. InputError: full."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(file, 0, 4 * count)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return False
        raise InputError(
            f"{folder} has no room for {name}, {4 * count / 1e9:.1f} GB ({error.strerror}): make room, or choose another --out"
        ) from None
    return True


class SharedArrays:
    """fp32 arrays that several processes map, each in a file of a folder that all of them see. Only the process that makes them has one.

    The files go with `unlink` or `close`. What is mapped stays until it is let go.
    """

    def __init__(self, folder: Path):
        self.folder = existing_folder(folder).absolute()
        self._arrays: dict[Path, Tensor] = {}

    def allocate(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An array of this shape. InputError if the disk is full."""
        path, count = self.folder / f".{uuid.uuid4().hex[:8]}", math.prod(shape)
        try:
            with open(path, "xb") as file:
                if not _reserve(file.fileno(), name, count, self.folder):
                    file.truncate(4 * count)
            self._arrays[path] = torch.from_file(str(path), shared=True, size=count)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return self._arrays[path].view(shape)

    def place(self, x: Tensor) -> dict[str, Any]:
        """Where another process finds x, as JSON for `open_shared`. An x that lies elsewhere is copied into an array first."""
        if x.dtype == torch.float32 and x.is_contiguous():
            for path, array in self._arrays.items():
                offset = x.data_ptr() - array.data_ptr()
                if offset >= 0 and offset + x.nbytes <= array.nbytes:
                    return {"path": str(path), "values": array.numel(), "first": offset // 4, "shape": list(x.shape)}
        return self.place(self.allocate("a copy", tuple(x.shape)).copy_(x))

    def unlink(self, place: Mapping[str, Any]) -> None:
        """Remove the file, which other processes have mapped."""
        Path(place["path"]).unlink(missing_ok=True)

    def forget(self, place: Mapping[str, Any]) -> None:
        """Remove the file, and do not find the array any more."""
        self._arrays.pop(Path(place["path"]), None)
        self.unlink(place)

    @property
    def paths(self) -> list[Path]:
        """The files, some of which may have been removed."""
        return list(self._arrays)

    def close(self) -> None:
        for path in self.paths:
            self.forget({"path": path})


def open_shared(place: Mapping[str, Any]) -> Tensor:
    """The array that `SharedArrays.place` described. InputError if this process does not see the file."""
    path = Path(place["path"])
    if not path.is_file():
        raise InputError(f"{str(path.parent)!r} is not the same folder here as on rank 0: give an --out that all nodes share")
    return part_of(torch.from_file(str(path), shared=True, size=place["values"]), place)


def part_of(array: Tensor, place: Mapping[str, Any]) -> Tensor:
    """What `SharedArrays.place` described, of the whole array."""
    return array[place["first"] :][: math.prod(place["shape"])].view(place["shape"])


def check_writable(out_dir: Path) -> None:
    """Raise InputError unless files can be written into `out_dir`, which need not exist. Leaves no files or folders behind."""
    files = AtomicFiles()
    try:
        files.add(out_dir / "probe").write_bytes(b"probe")
    except OSError as error:
        raise InputError(f"cannot write into the folder {str(out_dir)!r} ({error.strerror}): choose another output folder") from error
    finally:
        files.discard()
