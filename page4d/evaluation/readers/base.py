"""What the evaluation needs of a dataset: named sequences, read one at a time, and the rules of its protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...data.preprocess import Size
from ...data.sample import Sample
from ...errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is asked of a reader. None = what the protocol of the dataset says."""

    tasks: set[str] | None = None
    frames: int | None = None  # maximum number per sequence
    size: Size | None = None  # of synthetic scenes
    seed: int = 0  # of synthetic scenes
    sequences: int | None = None  # maximum number


@dataclass(frozen=True)
class Rules:
    """What is evaluated in a dataset. None = everything."""

    tasks: frozenset[str] | None = None  # the tasks with usable ground truth
    pose_sequences: frozenset[str] | None = None  # the sequences with usable poses
    max_depth: float = float("inf")  # pixels with a true depth of this or more are ignored
    official_clip: float = float("inf")  # the official script clamps predictions to this depth
    official_skip: frozenset[str] = frozenset()  # sequences that the official script leaves out of video depth

    def counts(self, task: str, sequence: str, official: bool = False) -> bool:
        """Whether the task is evaluated on the sequence."""
        if task == "pose" and self.pose_sequences is not None and sequence not in self.pose_sequences:
            return False
        if task == "depth" and official and sequence in self.official_skip:
            return False
        return self.tasks is None or task in self.tasks


@dataclass(frozen=True)
class Dataset:
    """Named sequences that are read one at a time. Iterating yields their `Sample`s."""

    name: str
    sequences: tuple[str, ...]
    read: Callable[[str], Sample]
    rules: Rules = field(default_factory=Rules)

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(sequence) for sequence in self.sequences)


def existing_folder(folder: Path, expected: str) -> Path:
    """Return `folder`, or raise InputError with what it should contain."""
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder: expected {expected}")
    return folder


def present(wanted: tuple[str, ...], folder: Path, expected: str) -> tuple[str, ...]:
    """The wanted subfolders that exist. Logs a warning if some are missing, and raises InputError if all are."""
    found = tuple(name for name in wanted if (folder / name).is_dir())
    if not found:
        raise InputError(f"no sequence in {str(folder)!r}: expected {expected}")
    if len(found) < len(wanted):
        missing = ", ".join(name for name in wanted if name not in found)
        log.warning("%s has no %s: the means are over fewer sequences than in the protocol", folder, missing)
    return found
