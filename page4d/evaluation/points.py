"""Metrics of predicted point maps: nearest-neighbour distances after a Sim(3) alignment, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import umeyama

METRICS = ("accuracy", "accuracy_median", "completeness", "completeness_median")


def point_metrics(predicted: Tensor, true: Tensor, *, max_points: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Distances between predicted points (N, 3) and the true points (N, 3) of the same pixels, in the unit of the truth.

    The prediction is first aligned by the similarity that fits the N pairs best.

    accuracy, accuracy_median: mean and median distance from each predicted point to the nearest true point.
    completeness, completeness_median: mean and median distance from each true point to the nearest predicted point.

    If there are more than `max_points` pairs, a random subset is compared. It depends only on N and `seed`. Sparser clouds are farther
    apart, so only compare numbers with the same limit. The median is the lower of two. NaN if N is 0 or a prediction is not finite.
    """
    if not len(true) or not predicted.isfinite().all():
        return dict.fromkeys(METRICS, float("nan"))
    aligned, true = umeyama(predicted, true).apply(predicted.double()), true.double()
    if len(true) > max_points:
        chosen = torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))[:max_points]
        aligned, true = aligned[chosen], true[chosen]
    accuracy, completeness = nearest_distances(aligned, true), nearest_distances(true, aligned)
    found = (accuracy.mean(), accuracy.median(), completeness.mean(), completeness.median())
    return {name: float(value) for name, value in zip(METRICS, found, strict=True)}


def nearest_distances(points: Tensor, others: Tensor, chunk: int = 1024) -> Tensor:
    """Distance (N,) from each of `points` (N, 3) to the nearest of `others` (M, 3), `chunk` rows of the N x M distances at a time."""
    exact = "donot_use_mm_for_euclid_dist"  # from differences: |a|^2 - 2ab + |b|^2 loses small distances to rounding
    return torch.cat([torch.cdist(rows, others, compute_mode=exact).amin(1) for rows in points.split(chunk)])
