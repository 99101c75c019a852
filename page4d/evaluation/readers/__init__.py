"""Datasets with ground truth, opened by name: synthetic:dynamic, sintel:FOLDER and so on. Each yields `page4d.data.sample.Sample`s.

A reader is one file in this folder and one line in `READERS`. The command line's help, the errors and docs/evaluation.md follow that table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from ...data.preprocess import Size
from ...errors import InputError
from .base import Dataset, Request, Rules
from .sintel import open_sintel
from .synthetic import KINDS, open_synthetic
from .tum import open_bonn, open_tum

__all__ = ["READERS", "SPECS", "Dataset", "Request", "Rules", "open_dataset"]


class Reader(NamedTuple):
    """How to open one dataset, and its row in docs/evaluation.md."""

    open: Callable[[str, Request], Dataset]  # the text after the colon, and what is asked for
    places: tuple[str, ...]  # what may follow the colon
    needs: str  # what must be there
    truth: str  # the tasks that it has ground truth for


READERS = {
    "synthetic": Reader(open_synthetic, KINDS, "nothing", "all"),
    "sintel": Reader(open_sintel, ("FOLDER",), "MPI Sintel's training set with depth and cameras", "pose, depth, points"),
    "tum": Reader(open_tum, ("FOLDER",), "TUM RGB-D sequences", "pose, depth, points"),
    "bonn": Reader(open_bonn, ("FOLDER",), "Bonn RGB-D Dynamic", "depth"),
}
SPECS = tuple(f"{name}:{place}" for name, reader in READERS.items() for place in reader.places)


def open_dataset(
    spec: str,
    *,
    tasks: set[str] | None = None,
    frames: int | None = None,
    size: Size | None = None,
    seed: int = 0,
    sequences: int | None = None,
) -> Dataset:
    """Open the dataset that `spec` names, one of `SPECS`.

    Args:
        tasks: what the dataset is for, of `page4d.evaluation.TASKS`. None = everything.
        frames: maximum number of frames per sequence. None = as in the dataset's protocol.
        size, seed: of synthetic scenes.
        sequences: maximum number of sequences. None = all.

    Raises:
        InputError: the dataset is unknown, missing or incomplete, has no ground truth for any of the tasks, or a number is not positive.
    """
    for what, number in (("frames", frames), ("sequences", sequences)):
        if number is not None and number < 1:
            raise InputError(f"the number of {what} must be at least 1, not {number}")
    name, _, where = spec.partition(":")
    if name not in READERS or not where:
        raise InputError(f"unknown data {spec!r}: use one of {', '.join(SPECS)}")
    data = READERS[name].open(where, Request(tasks, frames, size, seed, sequences))
    if tasks and not any(data.rules.counts(task, sequence) for task in tasks for sequence in data.sequences):
        raise InputError(f"{name} has no ground truth for {', '.join(sorted(tasks))}: choose other tasks or other data")
    return replace(data, sequences=data.sequences[:sequences])
