"""Places that a video comes back to: found by what the encoder sees, believed only after both visits were run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prediction import Prediction
from .align import AlignmentError
from .chunks import Chunk
from .pose_graph import Edge
from .seams import Seam, match

SIMILAR = 0.6  # cosine of descriptors, above which two frames may show one place
WINDOW = 25  # frames: of candidates nearer than this to a better one, in both visits, none is kept
MOST = 20  # candidates that are verified
AROUND = 4  # frames on each side of a candidate that are run together with those of the other visit
WORST = 0.15  # median relative difference of depths, above which two passes do not describe one place


@dataclass(frozen=True)
class Loop:
    """Frames `first` and `second` show one place. `seams`: how the chunk of each lies to the pass over both; `edge`: to each other."""

    first: int
    second: int
    cosine: float
    seams: tuple[Seam, Seam]
    edge: Edge  # between chunks


def descriptors(tokens: Tensor) -> Tensor:
    """(S, C) of encoder tokens (S, P, C): the mean over patches, less the mean over frames, of length 1.

    What all frames have in common, such as the style of the pictures, does not count.
    """
    mean = tokens.double().mean(1)
    mean = mean - mean.mean(0)
    return mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-12)


def candidates(
    described: Tensor, least_gap: int, similar: float = SIMILAR, window: int = WINDOW, most: int = MOST
) -> list[tuple[int, int, float]]:
    """(i, j, cosine) with j - i at least `least_gap`, the most similar first, after non-maximum suppression. Deterministic."""
    cosine = described @ described.T
    i, j = torch.triu_indices(len(described), len(described), least_gap)
    values = cosine[i, j]
    order = values.sort(descending=True, stable=True).indices
    found: list[tuple[int, int, float]] = []
    for index in order.tolist():
        value = float(values[index])
        if value < similar or len(found) == most:
            break
        a, b = int(i[index]), int(j[index])
        if all(max(abs(a - x), abs(b - y)) >= window for x, y, _ in found):
            found.append((a, b, value))
    return found


def verify(
    pair: tuple[int, int, float],
    chunks: Sequence[Chunk],
    pieces: Callable[[int], Prediction],
    predict: Callable[[Sequence[int]], Prediction],
    sigma: float,
    mask: bool = True,
) -> Loop | None:
    """The loop, if a pass over frames around both visits agrees with the chunks of both; else None.

    Args:
        pieces: the prediction of a chunk, by its number.
        predict: the prediction of one pass over frames, by their numbers.
        sigma: see `pose_graph.Edge`.
    """
    first, second, cosine = pair
    i, j = (_home(chunks, frame) for frame in (first, second))
    if i == j:
        return None
    visits = [_around(chunks[k], frame) for k, frame in ((i, first), (j, second))]
    both = predict([frame for visit in visits for frame in visit])
    parts = [both.frames(slice(0, len(visits[0]))), both.frames(slice(len(visits[0]), None))]
    seams = []
    for k, visit, part in zip((i, j), visits, parts, strict=True):
        start = chunks[k].start
        try:
            seams.append(match(pieces(k).frames(slice(visit[0] - start, visit[-1] + 1 - start)), part, mask))
        except AlignmentError:
            return None
    if not max(one.error for one in seams) <= WORST:  # NaN is not believed either
        return None
    similarity = seams[0].similarity.after(seams[1].similarity.inverse())
    return Loop(first, second, cosine, (seams[0], seams[1]), Edge(i, j, similarity, sigma, loop=True))


def _home(chunks: Sequence[Chunk], frame: int) -> int:
    """The chunk from which the frame is exported."""
    return next(k for k, chunk in enumerate(chunks) if frame < chunk.end)


def _around(chunk: Chunk, frame: int) -> range:
    """Frames of the chunk about one of them, as many as there are up to `AROUND` on each side."""
    return range(max(chunk.start, frame - AROUND), min(chunk.end, frame + AROUND + 1))
