"""A long sequence in chunks: a pass for each, aligned, joined, and kept on disk on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..geometry import Similarity
from ..prediction import Prediction
from .chunks import Chunk
from .join import JOINED, moved, places
from .loops import Loop, candidates, descriptors, verify
from .pose_graph import Edge, optimise, residual
from .seams import Seam, seam
from .store import Store

LEAST_SIGMA = 0.01  # of a seam, see `pose_graph.Edge`: the error that even a seam of equal depths may have
STORED = tuple(name for name in JOINED if name != "images")

Allocate = Callable[[str, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class LongVideo:
    """A sequence that was run in chunks."""

    prediction: Prediction  # all frames in the first chunk's world, each once
    chunks: list[Chunk]
    seams: list[Seam]  # between chunk k and k + 1
    loops: list[tuple[Loop, float, float]]  # with |e| before and after the pose graph
    places: list[Similarity]  # of the chunks in the first chunk's world


def run(
    images: Tensor,
    chunks: Sequence[Chunk],
    predict: Callable[[Tensor], Prediction],
    store: Store,
    allocate: Allocate,
    *,
    describe: Callable[[Tensor], Tensor] | None = None,
    mask: bool = True,
    advance: Callable[[Chunk], None] = lambda chunk: None,
) -> LongVideo:
    """Run the chunks that the store does not have, align them and join them.

    Args:
        images: (S, 3, H, W), may be mapped from disk.
        predict: one pass over images (n, 3, H, W).
        allocate: as in `Page4D.forward`, for the joined depth and points.
        describe: encoder tokens (n, P, C) of images (n, 3, H, W), to look for loops. None: no loops.
        mask: whether what moves is left out of the alignment.
        advance: called after each chunk.

    Raises:
        AlignmentError: neither points nor cameras of two neighbours can be aligned.
        InputError: the disk is full.
    """

    def piece(k: int) -> Prediction:
        part = images[None, chunks[k].start : chunks[k].end]
        found = store.read(f"chunk_{k:05d}")
        if found is None:
            whole = predict(part[0])
            found = {name: value.cpu() for name, value in whole.tensors().items() if name in STORED}
            store.write(f"chunk_{k:05d}", found)
        return Prediction(images=part, **found)  # type: ignore[arg-type]  # the fields of STORED are tensors

    seams: list[Seam] = []
    tokens: list[Tensor] = []
    before: Prediction | None = None
    for k, chunk in enumerate(chunks):
        now = piece(k)
        if before is not None:
            seams.append(seam(before, now, chunk.overlap, mask))
        if describe is not None:
            tokens.append(_described(store, k, now.images[0, chunk.own], describe))
        before = now
        advance(chunk)
    where = places(seams)
    loops: list[tuple[Loop, float, float]] = []
    if describe is not None and len(chunks) > 2:
        where, loops = _closed(images, chunks, seams, where, torch.cat(tokens), piece, predict, mask)
    return LongVideo(_joined(images, chunks, piece, where, allocate), list(chunks), seams, loops, where)


def _described(store: Store, k: int, images: Tensor, describe: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean tokens (n, C) of the frames that a chunk exports."""
    found = store.read(f"tokens_{k:05d}")
    if found is None:
        found = {"mean": describe(images).mean(1).float().cpu()}
        store.write(f"tokens_{k:05d}", found)
    return found["mean"]


def _sigma(one: Seam) -> float:
    return max(LEAST_SIGMA, one.error)


def _closed(
    images: Tensor,
    chunks: Sequence[Chunk],
    seams: Sequence[Seam],
    where: list[Similarity],
    tokens: Tensor,
    piece: Callable[[int], Prediction],
    predict: Callable[[Tensor], Prediction],
    mask: bool,
) -> tuple[list[Similarity], list[tuple[Loop, float, float]]]:
    """The places after the pose graph, and the loops that were believed."""
    sigma = max(_sigma(one) for one in seams)
    found = candidates(descriptors(tokens[:, None]), 2 * len(chunks[0]))

    def together(frames: Sequence[int]) -> Prediction:
        return predict(images[list(frames)])

    loops = [loop for pair in found if (loop := verify(pair, chunks, piece, together, sigma, mask)) is not None]
    if not loops:
        return where, []
    edges = [Edge(k, k + 1, one.similarity, _sigma(one)) for k, one in enumerate(seams)] + [loop.edge for loop in loops]
    units = []
    for k in range(len(chunks)):
        depth = piece(k).depth
        units.append(float(depth[depth > 0].median()) if depth is not None else 1.0)
    solved = optimise(where, edges, units)
    far = [[residual(loop.edge, nodes, units[loop.edge.j]) for loop in loops] for nodes in (where, solved)]
    return solved, list(zip(loops, *far, strict=True))


def _joined(
    images: Tensor, chunks: Sequence[Chunk], piece: Callable[[int], Prediction], where: Sequence[Similarity], allocate: Allocate
) -> Prediction:
    """All frames in one world. Depth and points are written chunk by chunk to what `allocate` gives."""
    whole: dict[str, Tensor] = {}
    for k, (chunk, place) in enumerate(zip(chunks, where, strict=True)):
        part = moved(piece(k).frames(chunk.own), place).tensors()
        del part["images"]
        frames = slice(chunk.start + chunk.overlap, chunk.end)
        for name, value in part.items():
            if name not in whole:
                whole[name] = allocate(name, (1, len(images), *value.shape[2:]))
            whole[name][:, frames] = value
    return replace(Prediction(images=images[None]), **whole)  # type: ignore[arg-type]  # tensors alone
