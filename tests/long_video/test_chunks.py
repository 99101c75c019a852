from __future__ import annotations

import itertools

import pytest

from page4d.errors import InputError
from page4d.long_video.chunks import Chunk, Chunking


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 12, 13, 14, 100, 301])
@pytest.mark.parametrize(("size", "overlap"), [(8, 1), (8, 2), (8, 7), (2, 1)])
def test_every_frame_is_exported_once(frames, size, overlap):
    chunks = Chunking(size, overlap).divide(frames)
    owned = [frame for chunk in chunks for frame in range(chunk.start, chunk.end)[chunk.own]]
    assert owned == list(range(frames))
    for before, chunk in itertools.pairwise(chunks):
        assert before.end - chunk.start == chunk.overlap >= overlap
        assert len(chunk) == size, "all are of one length, so that each is as good as the others"
    assert all(chunk.overlap == overlap for chunk in chunks[1:-1])
    assert len(chunks[0]) == min(frames, size)


def test_what_cannot_be_divided():
    assert Chunking(8, 2).divide(5) == [Chunk(0, 5, 0)]
    for size, overlap, words in ((1, 1, "at least 2 frames"), (8, 8, "overlap by 1 to 7 frames, not 8"), (8, 0, "not 0")):
        with pytest.raises(InputError, match=words):
            Chunking(size, overlap).divide(20)
