"""Where two chunks meet: the similarity between their worlds, from what both say of their common frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..geometry import Similarity
from ..prediction import Prediction
from .align import AlignmentError, from_cameras, sim3, weighted_median

MOST_POINTS = 20_000  # of the common frames, on a regular grid of pixels
STILL = 4  # power of 1 - motion: patches that move in part must count little
LEAST_CONFIDENCE = 0.1  # of the median; pixels below do not count


@dataclass(frozen=True)
class Seam:
    """How a chunk lies in the world of the chunk before."""

    similarity: Similarity  # from the chunk's world to that of the chunk before
    method: str  # "points" or "cameras"
    error: float  # median relative difference of the common depths after alignment (AbsRel)
    static: float  # share of the weight of the common pixels that stands still


def seam(before: Prediction, after: Prediction, overlap: int, mask: bool = True) -> Seam:
    """`match` of two chunks: the last `overlap` frames of `before` are the first ones of `after`."""
    return match(before.frames(slice(before.images.shape[1] - overlap, None)), after.frames(slice(0, overlap)), mask)


def match(first: Prediction, second: Prediction, mask: bool = True) -> Seam:
    """The similarity from the world of `second` to that of `first`, two predictions (B = 1) of the same frames.

    Each pixel has a point in both worlds. It counts by both confidences, by (1 - motion)^4 in both if there is a dynamics mask and `mask`
    is on, and by the inverse of its distance, as errors of depth grow with it. (The inverse square would be right for such errors alone.
    But what moves is near, and a mask by patches leaves some of it.) If the points do not determine the similarity, the
    cameras do, with the median ratio of the depths as scale.

    Raises:
        AlignmentError: neither does.
    """
    (points_a, conf_a), (points_b, conf_b) = (part.points("depth") for part in (second, first))
    assert first.depth is not None and second.depth is not None
    depth_a, depth_b = second.depth[..., 0], first.depth[..., 0]
    confidence = torch.where((conf_a > _least(conf_a)) & (conf_b > _least(conf_b)), (conf_a * conf_b).sqrt(), 0.0)
    if first.valid is not None:  # the same frames have the same padding
        confidence = torch.where(first.valid, confidence, 0.0)
    still = torch.ones_like(confidence)
    if mask and first.mask is not None and second.mask is not None:
        still = _still(first) * _still(second)
    weights = confidence * still**STILL / (depth_a / depth_a.median() + depth_b / depth_b.median())
    step = max(1, int((weights.numel() / MOST_POINTS) ** 0.5))
    a, b, w, za, zb = (x[0, :, step // 2 :: step, step // 2 :: step].flatten(0, 2) for x in (points_a, points_b, weights, depth_a, depth_b))
    counts = (w > 0) & za.isfinite() & zb.isfinite() & (za > 0) & (zb > 0)
    try:
        similarity, method = sim3(a, b, w), "points"
    except AlignmentError:
        ratio = weighted_median((zb / za)[counts].double(), w[counts].double()) if bool(counts.any()) else None
        similarity, method = from_cameras(second.cameras.extrinsics[0], first.cameras.extrinsics[0], ratio), "cameras"
    error = (similarity.scale * za / zb - 1).abs()[counts]
    share = float((confidence * still).sum() / confidence.sum()) if bool((confidence > 0).any()) else 0.0
    return Seam(similarity, method, float(error.median()) if len(error) else float("nan"), share)


def _least(confidence: Tensor) -> Tensor:
    return LEAST_CONFIDENCE * confidence.median()


def _still(prediction: Prediction) -> Tensor:
    """(1, S, H, W): 1 - motion, at the size of the images."""
    motion = prediction.motion
    return 1 - interpolate(motion, prediction.images.shape[-2:], mode="bilinear", align_corners=False).clamp(0, 1)
