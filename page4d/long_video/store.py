"""Chunks on disk, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import InputError
from ..files import AtomicFiles

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORD = "run.json"
LOCK = "lock"
CHECKSUM = "crc32"  # of a file's tensors, in its metadata
UNREADABLE = (safetensors.SafetensorError, OSError, ValueError)
RUN = "run"  # the record's hash, there too
OURS = re.compile(r"(chunk_\d{5,}|loop_\d{6,}_\d{6,})\.safetensors")
TEMPORARY = re.compile(r"\.[0-9a-f]{8}(\.\w+)?")  # what `AtomicFiles` leaves behind when the process is killed

log = logging.getLogger(__name__)


class Store:
    """Tensors by name in a folder, each file written as a whole or not at all.

    Args:
        folder: made if it is missing.
        record: what the results depend on, as JSON: options, weights, frames.
        resume: go on with the run that lies there, if there is one. Otherwise the folder must have none.

    Raises:
        InputError: there is a run and `resume` is off, or it has another record, or another process works on it.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], resume: bool = False):
        self.folder = folder
        self._run = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        self._checked: set[str] = set()
        before = recorded(folder)
        if before is None:
            with AtomicFiles() as files:
                files.add(folder / RECORD).write_text(json.dumps(record, sort_keys=True, indent=1) + "\n", encoding="utf-8")
            self._lock = _locked(folder / LOCK)
            return
        if not resume:
            raise InputError(f"{str(folder)!r} has a run that was not finished: go on with it with --resume, or remove the folder")
        now = json.loads(json.dumps(record))
        changed = sorted(key for key in {*now, *before} if before.get(key) != now.get(key))
        if changed:
            shown = [f"{key}: {before.get(key)}, now {now.get(key)}" if _short(before, now, key) else key for key in changed]
            words = f"the run in {str(folder)!r} was made with other options ({', '.join(shown)})"
            raise InputError(f"{words}: resume with the same ones, or remove the folder")
        self._lock = _locked(folder / LOCK)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name. InputError if the disk is full; what was written before stays."""
        whole = {key: value.contiguous() for key, value in tensors.items()}
        try:
            with AtomicFiles() as files:
                safetensors.torch.save_file(whole, files.add(self._path(name)), {CHECKSUM: _checksum(whole), RUN: self._run})
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{str(self.folder)!r}: {name} cannot be written ({reason}): make room, then go on with --resume") from None
        self._checked.add(name)

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a name, mapped from disk. None if they were not written, or are damaged, which a warning says."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            found = safetensors.torch.load_file(path)
            if name not in self._checked:
                with safetensors.safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                if metadata.get(RUN) != self._run:
                    raise ValueError("it is of another run")
                if metadata.get(CHECKSUM) != _checksum(found):
                    raise ValueError("its checksum is wrong")
                self._checked.add(name)
            return found
        except UNREADABLE as error:
            log.warning("%s cannot be used (%s): it is made again", path, error)
            return None

    def remove(self) -> None:
        """Remove what was written, and the folder if nothing else lies in it."""
        self._lock.close()
        with suppress(OSError):
            names = [path for path in self.folder.iterdir() if OURS.fullmatch(path.name) or TEMPORARY.fullmatch(path.name)]
            for path in [*names, self.folder / LOCK, self.folder / RECORD]:  # the record last: until then the rest is known to be ours
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def recorded(folder: Path) -> dict[str, Any] | None:
    """The record of the run in a folder. None if there is no run. InputError if it is damaged."""
    path = folder / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}): remove the folder and start without --resume") from None
    if not isinstance(found, dict):
        raise InputError(f"{str(path)!r} is damaged: remove the folder and start without --resume")
    return found


def _short(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    """Whether both values are a number or a short text."""
    return all(isinstance(each.get(key), str | int | float) and len(str(each.get(key))) < 30 for each in (before, now))


def _locked(path: Path) -> IO[bytes]:
    """The file, locked for this process as long as it is open: the end of a process unlocks it too. Without `fcntl` there is no lock."""
    file = open(path, "ab")  # noqa: SIM115  # stays open
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"another process works on the run in {str(path.parent)!r}: wait for it, or choose another --out") from None
        except OSError:  # a file system without locks
            pass
    return file


def sweep(out: Path, folders: Sequence[str], used: Collection[Path] = ()) -> None:
    """Remove the temporary files that a killed run left in some folders of an output folder, but not those that are in use."""
    for folder in folders:
        with suppress(OSError):
            for path in (out / folder).iterdir():
                if TEMPORARY.fullmatch(path.name) and path.absolute() not in used and path.is_file() and not path.is_symlink():
                    path.unlink()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().reshape(-1).view("uint8").data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"
