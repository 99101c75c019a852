"""Chunks in one world, each frame once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..geometry import Similarity, encode_pose
from ..prediction import Prediction
from .chunks import Chunk
from .seams import Seam

JOINED = ("images", "mask", "pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")


def places(seams: Sequence[Seam]) -> list[Similarity]:
    """The similarity from each chunk's world to the first chunk's, by the seams between neighbours."""
    found = [Similarity.identity()]
    for one in seams:
        found.append(found[-1].after(one.similarity))
    return found


def moved(prediction: Prediction, similarity: Similarity) -> Prediction:
    """The prediction in another world: cameras, depth and points. What has no frame, and the steps of refinement, are left out."""
    assert prediction.pose_enc is not None
    cameras, size = prediction.cameras, (prediction.images.shape[-2], prediction.images.shape[-1])
    extrinsics = similarity.cameras(cameras.extrinsics.double())
    pose = encode_pose(extrinsics, cameras.intrinsics.double(), size)
    changed: dict[str, Any] = {"pose_enc": pose}
    if prediction.depth is not None:
        changed["depth"] = prediction.depth * float(similarity.scale)
    if prediction.world_points is not None:
        changed["world_points"] = similarity.apply(prediction.world_points.double()).float()
    kept = {name: value for name, value in prediction.tensors().items() if name in JOINED}
    return Prediction(**{**kept, **changed})


def join(pieces: Sequence[Prediction], chunks: Sequence[Chunk], where: Sequence[Similarity]) -> Prediction:
    """All frames in the first chunk's world. Frames of an overlap are those of the earlier chunk."""
    parts = [moved(piece.frames(chunk.own), place).tensors() for piece, chunk, place in zip(pieces, chunks, where, strict=True)]
    whole: dict[str, Any] = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    return replace(Prediction(**whole), attention=pieces[0].attention)
