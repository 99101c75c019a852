"""From the worlds of chunks to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..geometry import Similarity, encode_pose
from ..prediction import Prediction
from .seams import Seam


def places(seams: Sequence[Seam]) -> list[Similarity]:
    """The similarity from each chunk's world to the first chunk's, by the seams between neighbours."""
    found = [Similarity.identity()]
    for one in seams:
        found.append(found[-1].after(one.similarity))
    return found


def moved(prediction: Prediction, similarity: Similarity) -> Prediction:
    """The prediction in another world: cameras, depth and points. The steps of the cameras' refinement are left out."""
    cameras, size = prediction.cameras, (prediction.images.shape[-2], prediction.images.shape[-1])
    pose = encode_pose(similarity.cameras(cameras.extrinsics.double()), cameras.intrinsics.double(), size)
    changed: dict[str, Any] = {"pose_enc": pose, "pose_enc_list": None}
    if prediction.depth is not None:
        changed["depth"] = prediction.depth * float(similarity.scale)
    if prediction.world_points is not None:
        changed["world_points"] = similarity.apply(prediction.world_points.double()).float()
    return replace(prediction, **changed)
