"""Chunks on disk, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import InputError
from ..files import AtomicFiles

IDENTITY = "run.json"
UNREADABLE = (safetensors.SafetensorError, OSError, ValueError)


class Store:
    """Tensors by chunk in a folder, each file written as a whole or not at all.

    Args:
        folder: made if it is missing.
        identity: what the results depend on, as JSON: options, weights, frames.
        resume: go on with what lies there. Otherwise the folder must have no run.

    Raises:
        InputError: there is a run and `resume` is off, there is none and it is on, or it has another identity.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], resume: bool = False):
        self.folder = folder
        path, text = folder / IDENTITY, json.dumps(identity, sort_keys=True, indent=1)
        if resume:
            self._check(path, json.loads(text))
        elif path.exists():
            raise InputError(f"{str(folder)!r} already has a run: go on with it with --resume, or remove the folder")
        else:
            with AtomicFiles() as files:
                files.add(path).write_text(text, encoding="utf-8")

    def _check(self, path: Path, identity: dict[str, Any]) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"there is nothing to resume in {str(self.folder)!r} ({error.strerror}): start without --resume") from None
        except ValueError:
            raise InputError(f"{str(path)!r} is damaged: remove the folder and start without --resume") from None
        changed = [key for key in identity if not isinstance(before, dict) or before.get(key) != identity[key]]
        if changed:
            raise InputError(f"the run in {str(self.folder)!r} has other options ({', '.join(changed)}): resume with the same ones")

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name. InputError if the disk is full; what was written before stays."""
        try:
            with AtomicFiles() as files:
                safetensors.torch.save_file({key: value.contiguous() for key, value in tensors.items()}, files.add(self._path(name)))
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{str(self.folder)!r}: {name} cannot be written ({reason}): make room, then go on with --resume") from None

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a name, mapped from disk. None if they were not written, or are damaged and have to be made again."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            return safetensors.torch.load_file(path)
        except UNREADABLE:
            return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
