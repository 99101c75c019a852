"""Alignment of two reconstructions of the same frames: the similarity from one's world to the other's.

Points of the same pixels are fitted by iteratively reweighted least squares. Where they do not determine a similarity, the cameras of the
common frames do, with the scale from depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..geometry import Similarity, umeyama

ROUNDS = 20
CONVERGED = 1e-9  # change of the weighted mean residual, relative to it
HUBER = 1.345  # in standard deviations: 95 % efficient for Gaussian noise
DEVIATION = 1.4826 / 1.5382  # of one coordinate, by the median length of 3-D Gaussian vectors, from that of 1-D ones
LEAST_POINTS = 16
WORST = 0.5  # of the spread of the points: how far apart pairs may stay
THIN = 1e-3  # the second axis of a set of points, relative to its first, below which it is a line


class AlignmentError(UserError):
    """Two reconstructions cannot be aligned."""


def sim3(points_a: Tensor, points_b: Tensor, weights: Tensor | None = None, *, rounds: int = ROUNDS) -> Similarity:
    """The similarity x -> s R x + t that maps points of a onto points of b, the same pixels in both.

        minimise  sum_i w_i rho(|s R a_i + t - b_i| / sigma),   rho: Huber, sigma from the weighted median of the lengths

    Each round is the closed form of Umeyama with the weights w_i min(1, k / |r_i|). Deterministic, in float64.

    Args:
        points_a, points_b: (N, 3). Pairs that are not finite do not count.
        weights: (N,), at least 0, such as confidence times the probability of standing still.

    Raises:
        AlignmentError: fewer than 16 pairs count, the points lie on a line or in one place, which leaves a rotation free (planes serve),
            or half of the pairs stay further apart than half of the points' spread.
    """
    a, b = points_a.double(), points_b.double()
    w = a.new_ones(len(a)) if weights is None else weights.double()
    counts = a.isfinite().all(1) & b.isfinite().all(1) & w.isfinite() & (w > 0)
    if int(counts.sum()) < LEAST_POINTS:
        raise AlignmentError(f"only {int(counts.sum())} common points count, and {LEAST_POINTS} are needed")
    a, b, w = a[counts], b[counts], w[counts] / w[counts].sum()
    for points in (a, b):
        _check_spread(points, w)
    found, before = umeyama(a, b, w), float("inf")
    for _ in range(rounds):
        length = (found.apply(a) - b).norm(dim=1)
        limit = HUBER * DEVIATION * weighted_median(length, w)
        if limit <= 0:
            break  # at least half of the pairs fit exactly
        found = umeyama(a, b, w * (limit / length.clamp(min=limit)))
        error = float(w @ length)
        if abs(before - error) <= CONVERGED * error:
            break
        before = error
    spread = (w @ (b - w @ b).square().sum(1)).sqrt()
    apart = weighted_median((found.apply(a) - b).norm(dim=1), w)
    if not (found.scale > 0 and found.scale.isfinite() and apart < WORST * spread):
        raise AlignmentError("the common points do not agree: no similarity maps one set onto the other")
    return found


def from_cameras(extrinsics_a: Tensor, extrinsics_b: Tensor, ratio: Tensor | float | None = None) -> Similarity:
    """The similarity that maps the cameras of a onto those of b, (S, 3, 4) camera-from-world each, in float64.

    The rotation is the mean of the frames' own, R_b^T R_a, and the translation that of the centres. The scale is `ratio`, how much longer
    b's lengths are (such as the median ratio of depths), or else that of the centres' spread.

    Raises:
        AlignmentError: there is no ratio, and the centres of a or of b coincide, or do not move alike: nothing says how long anything is.
            Or a number is not finite.
    """
    if not (extrinsics_a.isfinite().all() and extrinsics_b.isfinite().all()):
        raise AlignmentError("the common cameras are not finite")
    rotations_a, rotations_b = (x[..., :3].double() for x in (extrinsics_a, extrinsics_b))
    centres_a, centres_b = (-(x[..., :3].double().mT @ x[..., 3:].double()).squeeze(-1) for x in (extrinsics_a, extrinsics_b))
    u, _, vt = torch.linalg.svd((rotations_b.mT @ rotations_a).mean(0))
    flip = torch.diag(torch.stack([u.new_ones(()), u.new_ones(()), torch.det(u @ vt).sign()]))
    rotation = u @ flip @ vt
    mean_a, mean_b = centres_a.mean(0), centres_b.mean(0)
    if ratio is None:
        away_a, away_b = (centres_a - mean_a) @ rotation.mT, centres_b - mean_b
        ratio = away_b.norm() / away_a.norm()
        if not (ratio > 0 and (ratio * away_a - away_b).norm() < WORST * away_b.norm()):  # also if one of them is 0
            raise AlignmentError("the common cameras stand still or disagree, and there is no common depth: the scale cannot be found")
    scale = torch.as_tensor(ratio, dtype=torch.float64, device=rotation.device)
    if not (scale > 0 and scale.isfinite()):
        raise AlignmentError(f"the ratio of the depths is {float(scale):g}: the scale cannot be found")
    return Similarity(scale, rotation, mean_b - scale * rotation @ mean_a)


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The least of the values (N,) up to which half of the weight lies."""
    ordered, order = values.sort()
    reached = weights[order].cumsum(0)
    return ordered[torch.searchsorted(reached, reached[-1] / 2).clamp(max=len(values) - 1)]


def _check_spread(points: Tensor, weights: Tensor) -> None:
    centred = points - weights @ points
    axes = torch.linalg.eigvalsh(centred.mT @ (weights[:, None] * centred)).clamp(min=0).sqrt()  # ascending
    if axes[1] <= THIN * axes[2] or axes[2] == 0:
        raise AlignmentError("the common points lie on a line or in one place, which leaves a rotation free")
