"""Datasets with ground truth, by a word such as synthetic:dynamic or sintel:FOLDER. Each yields `page4d.data.sample.Sample`s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...data.preprocess import Size
from ...errors import InputError
from .base import Dataset, Rules
from .sintel import open_sintel
from .synthetic import open_synthetic
from .tum import open_bonn, open_tum

__all__ = ["Dataset", "Rules", "open_dataset"]

FOLDERS: dict[str, Callable[..., Dataset]] = {"sintel": open_sintel, "tum": open_tum, "bonn": open_bonn}


def open_dataset(
    spec: str,
    *,
    tasks: set[str] | None = None,
    frames: int | None = None,
    size: Size | None = None,
    seed: int = 0,
    sequences: int | None = None,
) -> Dataset:
    """The dataset that `spec` names: synthetic:static, synthetic:dynamic, sintel:FOLDER, tum:FOLDER or bonn:FOLDER.

    `frames`: at most so many per sequence, instead of what the protocol says; `sequences`: only so many; `tasks`: what it is for.
    `size` and `seed` are of the synthetic scenes. InputError if it is not there, or has no truth for any of the tasks.
    """
    name, _, where = spec.partition(":")
    for what, number in (("frames", frames), ("sequences", sequences)):
        if number is not None and number < 1:
            raise InputError(f"the number of {what} has to be at least 1, not {number}")
    if name == "synthetic":
        return open_synthetic(where, frames=frames, size=size, seed=seed, sequences=sequences)
    if name not in FOLDERS or not where:
        known = ", ".join(["synthetic:static", "synthetic:dynamic", *(f"{name}:FOLDER" for name in FOLDERS)])
        raise InputError(f"unknown data {spec!r}: use one of {known}")
    data = FOLDERS[name](Path(where).expanduser(), tasks=tasks, frames=frames)
    if tasks and not any(data.rules.counts(task, sequence) for task in tasks for sequence in data.sequences):
        raise InputError(f"{name} has no ground truth for {', '.join(sorted(tasks))}: choose other tasks or other data")
    return replace(data, sequences=data.sequences[:sequences])
