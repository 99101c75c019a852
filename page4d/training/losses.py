"""The training losses of VGGT / PAGE-4D: camera, depth and points, and supervision of tracks and of the mask.

Targets are normalised samples, see `targets.normalise`. All terms are fp32 scalars. In all shapes B is the batch, S the frames of a
sequence, and H x W the image size in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..data.sample import Sample
from ..geometry import encode_pose
from ..prediction import Prediction
from .config import LossConfig

LARGEST = 100.0
KEPT_FRACTION = 0.98  # of the errors of a batch; the largest are left out
MIN_SAMPLES = 1000  # up to this many errors are not filtered
DEGENERATE_NORM = 1e-8  # a cross product shorter than this has no defined direction
SUBSAMPLE_ABOVE = 100_000_000  # for more errors than this, the quantile comes from a random subset


def sanitise(x: Tensor) -> Tensor:
    """x with NaN and infinities replaced by 0, clamped to [-100, 100]."""
    return x.nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST, LARGEST)


def without_largest(x: Tensor) -> Tensor:
    """x (n,) without the values at or above its nearest-rank 0.98 quantile; unchanged if 1000 or fewer would remain."""
    if len(x) <= MIN_SAMPLES:
        return x
    x = x.clamp_max(LARGEST)
    drawn = x.detach()
    if len(x) > SUBSAMPLE_ABOVE:
        drawn = drawn[torch.randint(len(x), (1_000_000,), device=x.device)]
    rank = round(KEPT_FRACTION * (len(drawn) - 1)) + 1
    kept = x[x < drawn.kthvalue(rank).values]
    return kept if len(kept) > MIN_SAMPLES else x


def camera_loss(pose_enc_list: Tensor, target: Sample) -> Tensor:
    """Mean L1 errors of pose encodings (n, B, S, 9): translation + quaternion + fov / 2.

    The n refinements i are summed with weights 0.6^(n-1-i) / n. Sequences with at most 100 valid pixels in their first frame are left out.
    """
    assert target.valid is not None
    size = (target.images.shape[-2], target.images.shape[-1])
    wanted = encode_pose(target.extrinsics, target.intrinsics, size)
    chosen = target.valid[:, 0].flatten(1).sum(1) > 100
    count = len(pose_enc_list)
    total = pose_enc_list.sum() * 0
    if not chosen.any():
        return total
    for i, predicted in enumerate(pose_enc_list):
        error = (predicted - wanted)[chosen].abs()
        translation = error[..., :3].clamp_max(LARGEST).mean()
        terms = sanitise(translation) + sanitise(error[..., 3:7].mean()) + 0.5 * sanitise(error[..., 7:].mean())
        total = total + 0.6 ** (count - 1 - i) * terms / count
    return total


def _regression(error: Tensor, confidence: Tensor, gamma: float, alpha: float) -> Tensor:
    """mean(gamma e k - alpha log k) + mean(e) of errors e and confidences k at valid pixels (n,). Each mean omits its largest values."""
    e, k = sanitise(error), confidence.clamp_min(1e-6)
    return without_largest(sanitise(gamma * e * k - alpha * k.log())).mean() + without_largest(e).mean()


def depth_loss(depth: Tensor, confidence: Tensor, target: Sample) -> Tensor:
    """Loss of depth (B, S, H, W, 1) with confidence (B, S, H, W): regression (gamma 0.3, alpha 0.06) and gradients of the error.

    0 if fewer than 100 pixels are valid.
    """
    assert target.depth is not None and target.valid is not None
    valid = target.valid
    if valid.sum() < 100:
        return depth.sum() * 0
    error = depth[..., 0] - target.depth
    return _regression(error[valid].abs(), confidence[valid], 0.3, 0.06) + _gradients(error, valid)


def _gradients(error: Tensor, valid: Tensor) -> Tensor:
    """Mean over strides 1, 2, 4, 8 of sum(|d_x e| + |d_y e|) / n over pairs of valid pixels; error e and valid (B, S, H, W)."""
    error = torch.where(valid, error, 0.0)
    total = error.sum() * 0
    for stride in (1, 2, 4, 8):
        e, m = error[..., ::stride, ::stride], valid[..., ::stride, ::stride]
        across = (e[..., 1:] - e[..., :-1]).abs().clamp_max(LARGEST) * (m[..., 1:] & m[..., :-1])
        down = (e[..., 1:, :] - e[..., :-1, :]).abs().clamp_max(LARGEST) * (m[..., 1:, :] & m[..., :-1, :])
        total = total + sanitise((across.sum() + down.sum()) / m.sum().clamp_min(1)) / 4
    return total


def point_loss(points: Tensor, confidence: Tensor, target: Sample) -> Tensor:
    """Loss of points (B, S, H, W, 3) with confidence (B, S, H, W): regression (gamma 1, alpha 0.2) and surface normals.

    0 if fewer than 100 pixels are valid.
    """
    assert target.world_points is not None and target.valid is not None
    valid = target.valid
    if valid.sum() < 100:
        return points.sum() * 0
    loss = _regression((points - target.world_points)[valid].norm(dim=-1), confidence[valid], 1.0, 0.2)
    for stride in (1, 2, 4):
        predicted, wanted = points[..., ::stride, ::stride, :], target.world_points[..., ::stride, ::stride, :]
        loss = loss + _normal_error(predicted, wanted, valid[..., ::stride, ::stride]) / 3
    return loss


def _normal_error(predicted: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """mean(1 - cos) between predicted and true normals. A pixel has four: up x left, left x down, down x right, right x up."""
    a, ok = _normals(predicted, valid)
    b, _ = _normals(wanted, valid)
    if ok.sum() < 10:
        return predicted.sum() * 0
    return sanitise((1 - (a * b).sum(-1))[ok]).mean()


def _normals(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normals (4, B, S, H, W, 3), and whether all three pixels are valid (4, B, S, H, W). Pixels outside the image are not.

    Where points (nearly) coincide, the normal and its gradient are 0. Otherwise the gradient would be unbounded.
    """
    around = F.pad(points, (0, 0, 1, 1, 1, 1))
    inside = F.pad(valid, (1, 1, 1, 1))
    centre = points
    up, down = around[..., :-2, 1:-1, :] - centre, around[..., 2:, 1:-1, :] - centre
    left, right = around[..., 1:-1, :-2, :] - centre, around[..., 1:-1, 2:, :] - centre
    m_up, m_down = inside[..., :-2, 1:-1], inside[..., 2:, 1:-1]
    m_left, m_right = inside[..., 1:-1, :-2], inside[..., 1:-1, 2:]
    pairs = [(up, left, m_up, m_left), (left, down, m_left, m_down), (down, right, m_down, m_right), (right, up, m_right, m_up)]
    normals = torch.stack([torch.linalg.cross(a, b) for a, b, _, _ in pairs])
    normals = torch.where(normals.detach().norm(dim=-1, keepdim=True) > DEGENERATE_NORM, normals, 0.0)
    return F.normalize(normals, dim=-1), torch.stack([ma & mb & valid for _, _, ma, mb in pairs])


def track_loss(track_list: Tensor, visibility: Tensor, target: Sample) -> Tensor:
    """Loss of tracks (n, B, S, N, 2) in pixels and of visibility (B, S, N), which is a probability and not a logit.

    The mean L1 error of visible points (0 without any), in units of the image's longer side, summed over the n refinements i with weights
    0.8^(n-1-i) / n, plus the binary cross-entropy of visibility.
    """
    assert target.tracks is not None and target.track_visible is not None
    seen, count = target.track_visible, len(track_list)
    total = _cross_entropy(visibility, seen.float())
    for i, track in enumerate(track_list):
        error = (track - target.tracks)[seen].abs() / max(target.images.shape[-2:])
        total = total + 0.8 ** (count - 1 - i) * sanitise(error).sum() / max(error.numel(), 1) / count
    return total


def mask_loss(mask: Tensor, target: Sample) -> Tensor:
    """Binary cross-entropy of 1/2 + mask, the predicted probability that a patch is static; mask (B, S, h, w) in (-1/2, 1/2).

    The target is the fraction of a patch's pixels that are static.
    """
    assert target.dynamic is not None
    dynamic = rearrange(target.dynamic, "b s h w -> (b s) 1 h w").float()
    moving = F.adaptive_avg_pool2d(dynamic, (mask.shape[-2], mask.shape[-1])).view_as(mask)
    return _cross_entropy(mask + 0.5, 1 - moving)


def _cross_entropy(probability: Tensor, truth: Tensor) -> Tensor:
    """Mean binary cross-entropy. Not torch's: that one asserts on NaN, and the trainer reports NaN with step and terms."""
    p = probability.float().clamp(1e-6, 1 - 1e-6)
    return -(truth * p.log() + (1 - truth) * (-p).log1p()).mean()


def total_loss(prediction: Prediction, target: Sample, weights: LossConfig) -> dict[str, Tensor]:
    """The weighted sum as "loss", and each term with a non-zero weight under its name. `target` is normalised ground truth."""
    found: dict[str, Tensor] = {}
    if weights.camera:
        assert prediction.pose_enc_list is not None
        found["camera"] = camera_loss(prediction.pose_enc_list, target)
    if weights.depth:
        assert prediction.depth is not None and prediction.depth_conf is not None
        found["depth"] = depth_loss(prediction.depth, prediction.depth_conf, target)
    if weights.points:
        assert prediction.world_points is not None and prediction.world_points_conf is not None
        found["points"] = point_loss(prediction.world_points, prediction.world_points_conf, target)
    if weights.track:
        assert prediction.track_list is not None and prediction.vis is not None
        found["track"] = track_loss(prediction.track_list, prediction.vis, target)
    if weights.mask:
        assert prediction.mask is not None
        found["mask"] = mask_loss(prediction.mask, target)
    terms = [getattr(weights, name) * value for name, value in found.items()]
    return {"loss": torch.stack(terms).sum(), **found}
