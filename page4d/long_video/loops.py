"""Places that a video comes back to: found by what the encoder sees, believed only after both visits were run together.

A frame is described by the means of its encoder tokens over coarse cells of the picture, where what moves does not count. Descriptors are
whitened by the sequence itself: what all its frames have in common does not count either. Two visits are alike if the frames around them
are, one by one, at any of a few ratios of speed. References: H. Jegou and O. Chum, Negative evidences and co-occurences in image retrieval
(whitening), ECCV 2012; M. Milford and G. Wyeth, SeqSLAM, ICRA 2012.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize, pad

from ..prediction import Prediction
from .align import AlignmentError
from .chunks import Chunk
from .pose_graph import Edge
from .seams import Seam, match

CELLS = (2, 3)  # of a picture: rows, columns
WIDTH = 768  # of a description; wider ones are projected at random
RANK = 32  # directions that are kept, at most one for `PER_DIRECTION` frames
PER_DIRECTION = 8
REACH = 12  # frames on each side of a pair that are compared
SPEEDS = (-1.0, 0.5, 0.75, 1.0, 4 / 3, 2.0)  # of the second visit; -1: the way back with the same view
ALIKE = 6.0  # standard deviations above the usual likeness of two frames, from which on two frames may show one place
BLOCK = 64  # frames that are compared with all others at a time
SAMPLED = 300  # frames by which the usual likeness is known
WINDOW = 10  # frames: of candidates nearer than this to a better one, in both visits, none is kept
MOST = 20  # candidates that are verified
AROUND = 4  # frames on each side of a candidate that are run together with those of the other visit
WORST = 0.15  # median relative difference of depths, above which two passes do not describe one place


@dataclass(frozen=True)
class Loop:
    """Frames `first` and `second` show one place. `seams`: how the chunk of each lies to the pass over both; `edge`: to each other."""

    first: int
    second: int
    likeness: float  # in standard deviations, see `candidates`
    seams: tuple[Seam, Seam]
    edge: Edge  # between chunks


def describe(tokens: Tensor, grid: tuple[int, int], motion: Tensor | None) -> Tensor:
    """(n, D) fp32: the means of encoder tokens (n, h w, C) over 2 x 3 cells, weighted by 1 - motion (n, h, w). D is at most 768."""
    patches = tokens.float().mT.unflatten(2, grid)  # (n, C, h, w)
    still = torch.ones_like(patches[:, :1]) if motion is None else (1 - motion[:, None]).clamp(1e-3, 1)
    cells = (adaptive_avg_pool2d(patches * still, CELLS) / adaptive_avg_pool2d(still, CELLS)).flatten(1)
    if cells.shape[1] <= WIDTH:
        return cells
    mix = torch.randn(cells.shape[1], WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    return cells @ mix


def whitened(described: Tensor) -> Tensor:
    """(S, R) of length 1: descriptions (S, D) less their mean, in the R directions of largest variance, scaled to the same variance."""
    apart = described.double() - described.double().mean(0)
    values, vectors = torch.linalg.eigh(apart.mT @ apart)  # ascending
    rank = min(RANK, max(1, len(described) // PER_DIRECTION))
    rank = min(rank, int((values > 1e-12 * values[-1]).sum()))
    return normalize(apart @ vectors[:, -rank:] / values[-rank:].sqrt()).float() if rank else described.new_zeros(len(described), 1)


def candidates(unit: Tensor, least_gap: int, alike: float = ALIKE, window: int = WINDOW, most: int = MOST) -> list[tuple[int, int, float]]:
    """(i, j, likeness) with j - i at least `least_gap`, the most alike first, after non-maximum suppression.

    likeness: the mean cosine of unit vectors (S, R) along 12 frames on each side of i and j, or along the 4 that would be run together if
    that is less, at the best ratio of speeds, in standard deviations above its median over pairs of frames. Of each i there is the best j.
    Deterministic, with memory linear in the number of frames.
    """
    pairs: list[tuple[int, int, float]] = []
    usual: list[Tensor] = []
    every = max(1, len(unit) // SAMPLED)
    for start, rows in _likeness(unit):
        for i, row in enumerate(rows[: max(0, len(unit) - least_gap - start)], start):
            later = row[i + least_gap :]
            best = later.max(0)
            pairs.append((i, i + least_gap + int(best.indices), float(best.values)))
            if i % every == 0:
                usual.append(later[later.isfinite()])
    values = torch.cat(usual) if usual else torch.zeros(0)
    if not len(values):
        return []
    median = values.median()
    deviation = 1.4826 * (values - median).abs().median()  # of a Gaussian with this median distance to its middle
    found: list[tuple[int, int, float]] = []
    for i, j, value in sorted(pairs, key=lambda pair: -pair[2]):
        likeness = float((value - median) / deviation.clamp(min=1e-6))
        if likeness < alike or len(found) == most:
            break
        if all(max(abs(i - x), abs(j - y)) >= window for x, y, _ in found):
            found.append((i, j, likeness))
    return found


def _likeness(unit: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, (rows, S)) of the mean cosines around all pairs; -inf where less than half of the frames around are in the sequence."""
    count, far = len(unit), 2 * REACH
    wide = pad(unit, (0, 0, far, far))
    there = pad(unit.new_ones(count), (far, far))
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        near = slice(start + far - REACH, start + far + size + REACH)
        cosine, exists = wide[near] @ wide.mT, there[near]
        best = unit.new_full((size, count), -torch.inf)
        for speed in SPEEDS:
            total, known = torch.zeros_like(best), torch.zeros_like(best)
            for k in sorted(range(-REACH, REACH + 1), key=abs):
                rows, columns = slice(REACH + k, REACH + k + size), slice(far + round(k * speed), far + round(k * speed) + count)
                total += cosine[rows, columns]
                known += exists[rows, None] * there[columns]
                if k == AROUND:  # the last of those that are run together
                    near_mean = total / known
            mean = torch.minimum(total / known, near_mean).masked_fill_(known <= REACH, -torch.inf)
            best = torch.maximum(best, mean)
        yield start, best


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
    first, second, likeness = pair
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
    return Loop(first, second, likeness, (seams[0], seams[1]), Edge(i, j, similarity, sigma, loop=True))


def _home(chunks: Sequence[Chunk], frame: int) -> int:
    """The chunk from which the frame is exported."""
    return next(k for k, chunk in enumerate(chunks) if frame < chunk.end)


def _around(chunk: Chunk, frame: int) -> range:
    """Frames of the chunk about one of them, up to `AROUND` on each side, but so that two visits are no more frames than a chunk."""
    reach = min(AROUND, max(0, (len(chunk) // 2 - 1) // 2))
    return range(max(chunk.start, frame - reach), min(chunk.end, frame + reach + 1))
