"""A long sequence in chunks: a pass for each, aligned, joined, and kept on disk on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from page4d_kernels.profiling import stage

from ..files import Allocate
from ..geometry import Similarity
from ..prediction import Prediction
from .align import AlignmentError
from .chunks import Chunk
from .join import moved, places
from .known import anchor
from .loops import Loop, candidates, verify, whitened
from .pose_graph import Edge, optimise, residual
from .seams import Seam, seam
from .store import Store

LOOP_SIGMA = 2.0  # of a loop, in that of the worst seam: one pass over two visits says less of their places than common frames do
UNKNOWN_SIGMA = 1.0  # of a seam by cameras alone, where no depth is common
LEAST_SIGMA = 0.01  # of a seam, see `pose_graph.Edge`: the error that even a seam of equal depths may have
DESCRIBED = "described"  # beside the fields of a prediction
JOINED = ("mask", "pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")
STORED = {*JOINED, "attention_deviation", DESCRIBED}

Predict = Callable[[Tensor], tuple[Prediction, Tensor]]  # one pass over (n, 3, H, W), with `loops.describe` of its frames


@dataclass(frozen=True)
class LongVideo:
    """A sequence that was run in chunks."""

    prediction: Prediction  # all frames in one world, each once
    chunks: list[Chunk]
    seams: list[Seam]  # between chunk k and k + 1
    loops: list[tuple[Loop, float, float]] | None  # with |e| before and after the pose graph. None: not looked for
    places: list[Similarity]  # from the chunks' worlds to that of the result
    unanchored: Tensor  # (S, 3, 4) extrinsics by seams and loops alone, in the world of the first chunk


def run(
    images: Tensor,
    chunks: Sequence[Chunk],
    predict: Predict,
    store: Store,
    allocate: Allocate,
    *,
    loops: bool = True,
    mask: bool = True,
    known: tuple[Sequence[int], Tensor] | None = None,
    valid: Tensor | None = None,
    advance: Callable[[Chunk], None] = lambda chunk: None,
) -> LongVideo:
    """Run the chunks that the store does not have, align them and join them.

    Args:
        images: (S, 3, H, W), may be mapped from disk.
        store: what it has is not run again.
        allocate: gives the memory of the joined results.
        loops: look for places that the video comes back to.
        mask: whether what moves is left out of the alignment.
        known: frames whose cameras are known, and these (n, 3, 4). The result is in their world then, else in that of the first chunk.
        valid: (S, H, W) bool, pixels that show the scene and not padding. None: all.
        advance: called after each chunk.

    Raises:
        AlignmentError: neither points nor cameras of two neighbours can be aligned, or the known cameras cannot be aligned with any chunk.
        InputError: the disk is full.
    """
    pieces = Pieces(images, chunks, predict, store, valid)
    seams: list[Seam] = []
    described: list[Tensor] = []
    before: Prediction | None = None
    for k, chunk in enumerate(chunks):
        now, seen = pieces.chunk(k)
        if before is not None:
            with stage("align"):
                seams.append(_seam(before, now, chunk, mask))
        described.append(seen[chunk.own])
        before = now
        advance(chunk)
    steps = [Edge(k, k + 1, one.similarity, _sigma(one)) for k, one in enumerate(seams)]
    where = places(seams)
    closed: list[Loop] = []
    looked = loops and len(chunks) > 2
    if looked:
        with stage("loops"):
            closed = _loops(pieces, LOOP_SIGMA * max(step.sigma for step in steps), torch.cat(described), mask)
    units = pieces.units() if closed or known else []
    if closed:
        with stage("pose graph"):
            solved = optimise(where, [*steps, *(loop.edge for loop in closed)], units)
        far = [[residual(loop.edge, nodes, units[loop.edge.j]) for loop in closed] for nodes in (where, solved)]
        where = solved
    unanchored = pieces.extrinsics(where)
    if known is not None:
        anchors = _anchors(pieces, unanchored, *known)
        edges = [*steps, *(loop.edge for loop in closed), *anchors]
        where = _anchored(where, edges, anchors, units)
    report = list(zip(closed, *far, strict=True)) if closed else [] if looked else None
    with stage("join"):
        whole = _joined(pieces, where, allocate)
    return LongVideo(whole, list(chunks), seams, report, where, unanchored)


class Pieces:
    """The passes of a run: from the store, or made and stored."""

    def __init__(self, images: Tensor, chunks: Sequence[Chunk], predict: Predict, store: Store, valid: Tensor | None = None):
        self.images, self.chunks, self.valid, self._predict, self._store = images, chunks, valid, predict, store

    def chunk(self, k: int) -> tuple[Prediction, Tensor]:
        return self._pass(f"chunk_{k:05d}", slice(self.chunks[k].start, self.chunks[k].end))

    def together(self, frames: Sequence[int]) -> Prediction:
        """One pass over frames of two visits to a place."""
        return self._pass(f"loop_{frames[0]:06d}_{frames[-1]:06d}", list(frames))[0]

    def units(self) -> list[float]:
        """The median depth of each chunk, which counts as one in the pose graph."""
        found = []
        for k in range(len(self.chunks)):
            one = self.chunk(k)[0]
            depth = torch.zeros(0) if one.depth is None else one.depth[..., 0] if one.valid is None else one.depth[..., 0][one.valid]
            found.append(float(depth[depth > 0].median()) if bool((depth > 0).any()) else 1.0)
        return found

    def extrinsics(self, where: Sequence[Similarity]) -> Tensor:
        """(S, 3, 4) of all frames, fp64, with the chunks at these places."""
        parts = [
            place.cameras(self.chunk(k)[0].cameras.extrinsics[0, chunk.own].double())
            for k, (chunk, place) in enumerate(zip(self.chunks, where, strict=True))
        ]
        return torch.cat(parts)

    def _pass(self, name: str, frames: slice | list[int]) -> tuple[Prediction, Tensor]:
        images = self.images[frames]
        found = self._store.read(name)
        if found is None:
            prediction, described = self._predict(images)
            found = {key: value for key, value in {**prediction.tensors(), DESCRIBED: described}.items() if key in STORED}
            self._store.write(name, found)
        fields: dict[str, Any] = {key: value for key, value in found.items() if key != DESCRIBED}
        if self.valid is not None:
            fields["valid"] = self.valid[None, frames]
        return Prediction(images=images[None], **fields), found[DESCRIBED]


def _seam(before: Prediction, now: Prediction, chunk: Chunk, mask: bool) -> Seam:
    try:
        return seam(before, now, chunk.overlap, mask)
    except AlignmentError as error:
        common = f"frames {chunk.start} to {chunk.start + chunk.overlap - 1}"
        raise AlignmentError(f"two chunks cannot be aligned by {common}, which they share ({error}): use a longer overlap") from None


def _sigma(one: Seam) -> float:
    return max(LEAST_SIGMA, one.error) if math.isfinite(one.error) else UNKNOWN_SIGMA


def _loops(pieces: Pieces, sigma: float, described: Tensor, mask: bool) -> list[Loop]:
    """The loops that are believed."""
    found = candidates(whitened(described), 2 * len(pieces.chunks[0]))
    checked = (verify(pair, pieces.chunks, lambda k: pieces.chunk(k)[0], pieces.together, sigma, mask) for pair in found)
    return [loop for loop in checked if loop is not None]


def _anchors(pieces: Pieces, unanchored: Tensor, frames: Sequence[int], cameras: Tensor) -> list[Edge]:
    """Edges from the known world, node -1, to the chunks whose own frames determine one. If none does, all frames together do."""
    number = {frame: n for n, frame in enumerate(frames)}
    anchors = []
    for k, chunk in enumerate(pieces.chunks):
        inside = [frame for frame in range(chunk.start + chunk.overlap, chunk.end) if frame in number]  # which are taken from this chunk
        predicted = pieces.chunk(k)[0].cameras.extrinsics[0, [frame - chunk.start for frame in inside]]
        with suppress(AlignmentError):
            similarity, error = anchor(predicted, cameras[[number[frame] for frame in inside]])
            anchors.append(Edge(-1, k, similarity, max(LEAST_SIGMA, error)))
    if anchors:
        return anchors
    similarity, error = anchor(unanchored[list(frames)], cameras)
    return [Edge(-1, 0, similarity, max(LEAST_SIGMA, error))]


def _anchored(where: Sequence[Similarity], edges: Sequence[Edge], anchors: Sequence[Edge], units: Sequence[float]) -> list[Similarity]:
    """The places in the known world. The pose graph starts with each chunk beside its nearest anchor."""
    start = []
    for k, place in enumerate(where):
        nearest = min(anchors, key=lambda edge: abs(edge.j - k))
        start.append(nearest.similarity.after(where[nearest.j].inverse()).after(place))
    shifted = [replace(edge, i=edge.i + 1, j=edge.j + 1) for edge in edges]
    return optimise([Similarity.identity(), *start], shifted, [1.0, *units])[1:]


def _joined(pieces: Pieces, where: Sequence[Similarity], allocate: Allocate) -> Prediction:
    """All frames in one world, each from the first chunk that has it. Depth and points are written chunk by chunk to what `allocate` gives.

    The deviation of an attention plan is the largest of all chunks.
    """
    whole: dict[str, Any] = {}
    deviation: Tensor | None = None
    for k, (chunk, place) in enumerate(zip(pieces.chunks, where, strict=True)):
        one = pieces.chunk(k)[0]
        if one.attention_deviation is not None:
            deviation = one.attention_deviation if deviation is None else torch.maximum(deviation, one.attention_deviation)
        part = moved(one.frames(chunk.own), place).tensors()
        frames = slice(chunk.start + chunk.overlap, chunk.end)
        for name in (name for name in JOINED if name in part):
            if name not in whole:
                whole[name] = allocate(name, (1, len(pieces.images), *part[name].shape[2:]))
            whole[name][:, frames] = part[name]
    return replace(Prediction(images=pieces.images[None], attention_deviation=deviation), **whole)
