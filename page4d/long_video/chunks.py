"""How a long sequence is divided into chunks of frames that overlap."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


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


def divide(frames: int, size: int, overlap: int) -> list[Chunk]:
    """Chunks of `size` frames, each of which begins with the last `overlap` frames of the one before.

    The last chunk is as long as the others, and overlaps more, so that no chunk has few frames. A sequence of at most `size` frames is one
    chunk.

    Raises:
        InputError: the size is less than 2, or the overlap is not between 1 and the size - 1.
    """
    if size < 2:
        raise InputError(f"a chunk needs at least 2 frames, not {size}")
    if not 1 <= overlap < size:
        raise InputError(f"chunks of {size} frames can overlap by 1 to {size - 1} frames, not {overlap}")
    chunks = [Chunk(0, min(size, frames), 0)]
    while chunks[-1].end < frames:
        end = min(chunks[-1].end + size - overlap, frames)
        chunks.append(Chunk(end - size, end, chunks[-1].end - (end - size)))
    return chunks
