"""Percentiles of more numbers than fit into the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def percentiles(parts: Callable[[], Iterable[NDArray[Any]]], percents: Sequence[float]) -> list[float]:
    """The percentiles of all fp32 numbers in `parts()`, which is gone through twice. Empty if there are none. NaN is not allowed.

    Equal to `np.percentile(np.concatenate(parts()), percents)`, without holding the numbers: the first pass counts them by their upper 16
    bits, the second counts those near the wanted ranks by their lower 16 bits.
    """

    def keys() -> Iterator[NDArray[np.uint32]]:
        for part in parts():
            bits = np.ascontiguousarray(part, np.float32).reshape(-1).view(np.uint32)
            yield np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # in the order of the numbers

    upper = np.zeros(1 << 16, np.int64)
    for key in keys():
        upper += np.bincount(key >> 16, minlength=1 << 16)
    below = np.cumsum(upper)
    if not below[-1]:
        return []
    places = [percent / 100 * (int(below[-1]) - 1) for percent in percents]
    ranks = sorted({rank for place in places for rank in (int(np.floor(place)), int(np.ceil(place)))})
    bins = [int(np.searchsorted(below, rank, side="right")) for rank in ranks]
    lower = {number: np.zeros(1 << 16, np.int64) for number in bins}
    for key in keys():
        for number, counts in lower.items():
            counts += np.bincount(key[key >> 16 == number] & 0xFFFF, minlength=1 << 16)
    values = {}
    for rank, number in zip(ranks, bins, strict=True):
        inside = rank - int(below[number] - upper[number])
        found = np.uint32(number << 16 | int(np.searchsorted(np.cumsum(lower[number]), inside, side="right")))
        values[rank] = float(np.array(found ^ np.uint32(1 << 31) if found >> 31 else ~found, np.uint32).view(np.float32))
    return [_between(values[int(np.floor(place))], values[int(np.ceil(place))], place % 1) for place in places]


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low) if share else low  # without share, also for infinities
