"""What a dataset is to the evaluation: named sequences, read one at a time, and the rules of its protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...data.sample import Sample
from ...errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """What counts in a dataset. None means everything."""

    tasks: frozenset[str] | None = None  # those that it has a usable truth for
    pose_sequences: frozenset[str] | None = None
    max_depth: float = float("inf")  # true depths from here on do not count
    official_clip: float = float("inf")  # the official script cuts predictions here
    official_skip: frozenset[str] = frozenset()  # sequences that the official script leaves out of video depth

    def counts(self, task: str, sequence: str, official: bool = False) -> bool:
        if task == "pose" and self.pose_sequences is not None and sequence not in self.pose_sequences:
            return False
        if task == "depth" and official and sequence in self.official_skip:
            return False
        return self.tasks is None or task in self.tasks


@dataclass(frozen=True)
class Dataset:
    name: str
    sequences: tuple[str, ...]
    read: Callable[[str], Sample]
    rules: Rules = field(default_factory=Rules)

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(sequence) for sequence in self.sequences)


def existing_folder(folder: Path, expected: str) -> Path:
    """The folder, or an InputError that says what should be there."""
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder: expected {expected}")
    return folder


def present(wanted: tuple[str, ...], folder: Path, expected: str) -> tuple[str, ...]:
    """The wanted sub-folders that exist: all, some with a warning, or none with an InputError."""
    found = tuple(name for name in wanted if (folder / name).is_dir())
    if not found:
        raise InputError(f"no sequence in {str(folder)!r}: expected {expected}")
    if len(found) < len(wanted):
        missing = ", ".join(name for name in wanted if name not in found)
        log.warning("%s has no %s: the means are over fewer sequences than the protocol's", folder, missing)
    return found
