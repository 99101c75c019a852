"""Metrics of the predicted motion map against the true motion, on the model's patch grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

METRICS = ("auc", "iou", "best_iou", "best_threshold")


def moving_patches(dynamic: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (S, h, w) bool of which more than half moves, from pixels (S, H, W) bool. Exact if H, W are multiples of h, w."""
    return F.interpolate(dynamic[:, None].double(), size=grid, mode="area")[:, 0] > 0.5


def mask_metrics(motion: Tensor, moving: Tensor) -> dict[str, float]:
    """Metrics of scores `motion` in (0, 1) against the truth `moving` (bool, same shape), over all patches of all frames.

    auc: probability that a moving patch scores above a static one; a tie counts half (Mann-Whitney).
    iou: intersection over union of motion > 0.5 (a key bias below 0) and moving.
    best_iou: the same for motion >= best_threshold, the best threshold for this truth. It is an upper bound, as the truth selects it.
    All are NaN if nothing moves or a score is not finite; auc also if everything moves.
    """
    scores, truth = motion.double().flatten(), moving.flatten()
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not scores.isfinite().all():
        return dict.fromkeys(METRICS, float("nan"))
    values, group, sizes = scores.unique(return_inverse=True, return_counts=True)  # ascending
    hits = torch.zeros(len(values), dtype=torch.float64).index_add_(0, group, truth.double())  # moving patches per value
    ranks = sizes.cumsum(0) - (sizes - 1) / 2  # mean rank of tied values, starting at 1
    auc = ((hits * ranks).sum() - positives * (positives + 1) / 2) / (positives * negatives) if negatives else float("nan")

    above, hits_above = (x.flip(0).cumsum(0).flip(0) for x in (sizes, hits))  # number of patches with at least this value
    ious = hits_above / (above + positives - hits_above)
    best = int(ious.argmax())
    chosen = scores > 0.5
    iou = (chosen & truth).sum() / (chosen | truth).sum()
    found = (auc, iou, ious[best], values[best])
    return {name: float(value) for name, value in zip(METRICS, found, strict=True)}
