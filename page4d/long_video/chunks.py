"""How a long sequence is divided into chunks of frames that overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

from ..errors import InputError

SHARE = 4  # a chunk of N frames overlaps the one before by N / SHARE frames, if nothing else is asked for


@dataclass(frozen=True)
class Chunk:
    """Frames `start` to `end` - 1. The first `overlap` of them also belong to the chunk before."""

    start: int
    end: int
    overlap: int  # 0 for the first chunk

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def own(self) -> slice:
        """Of the chunk's frames, those that are exported from it: all but the ones that the chunk before has."""
        return slice(self.overlap, len(self))


@dataclass(frozen=True)
class Chunking:
    """Chunks of `size` frames, each of which begins with the last `overlap` frames of the one before.

    Raises:
        InputError: the size is less than 2, or the overlap is not between 1 and the size - 1.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.size < 2:
            raise InputError(f"a chunk needs at least 2 frames, not {self.size}")
        if not 1 <= self.overlap < self.size:
            raise InputError(f"chunks of {self.size} frames can overlap by 1 to {self.size - 1} frames, not {self.overlap}")

    @classmethod
    def of(cls, value: Chunking | int | Sequence[int] | str) -> Chunking:
        """From N, (N, OVERLAP), "N" or "N,OVERLAP". The overlap is N / 4 if it is not given.

        Raises:
            InputError: it is none of these, or such chunks cannot be.
        """
        if isinstance(value, Chunking):
            return value
        try:
            numbers = (
                [int(word) for word in value.split(",")] if isinstance(value, str) else [*value] if isinstance(value, Iterable) else [value]
            )
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2) or not all(isinstance(number, Integral) and not isinstance(number, bool) for number in numbers):
            raise InputError(f"chunk {value!r} does not work: give a number of frames such as 60, or with the overlap such as 60,15")
        numbers = [int(number) for number in numbers]
        size = numbers[0]
        return cls(size, numbers[1] if len(numbers) == 2 else max(1, size // SHARE))

    def divide(self, frames: int) -> list[Chunk]:
        """The last chunk is as long as the others, and overlaps more, so that no chunk has few frames. A sequence of at most `size` frames
        is one chunk.
        """
        chunks = [Chunk(0, min(self.size, frames), 0)]
        while chunks[-1].end < frames:
            end = min(chunks[-1].end + self.size - self.overlap, frames)
            chunks.append(Chunk(end - self.size, end, chunks[-1].end - (end - self.size)))
        return chunks

    def __str__(self) -> str:
        return f"{self.size} frames, {self.overlap} of them in common with the chunk before"
