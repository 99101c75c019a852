from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from page4d.evaluation.mask import METRICS, mask_metrics, moving_patches


def scores(levels: int | None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Motion (3, 6, 8), with ties if `levels` limits the number of values, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    moving = torch.rand(3, 6, 8, generator=generator) < 0.3
    motion = (torch.rand(3, 6, 8, generator=generator) + 0.3 * moving) / 1.3
    return (motion if levels is None else (motion * levels).round() / levels), moving


@pytest.mark.parametrize("levels", [None, 2, 10])
@pytest.mark.parametrize("seed", range(3))
def test_against_scipy_and_brute_force(levels, seed):
    motion, moving = scores(levels, seed)
    x, y = motion.double().numpy().ravel(), moving.numpy().ravel()
    found = mask_metrics(motion, moving)
    assert found["auc"] == pytest.approx(mannwhitneyu(x[y], x[~y]).statistic / (y.sum() * (~y).sum()))

    def iou(chosen: np.ndarray) -> float:
        return (chosen & y).sum() / (chosen | y).sum()

    assert found["iou"] == pytest.approx(iou(x > 0.5))
    assert found["best_iou"] == pytest.approx(max(iou(x >= threshold) for threshold in x))
    assert found["best_iou"] == pytest.approx(iou(x >= found["best_threshold"]))


def test_perfect_wrong_and_undefined_masks():
    _, moving = scores(None)
    assert mask_metrics(moving.float() * 0.5 + 0.25, moving) == pytest.approx({"auc": 1, "iou": 1, "best_iou": 1, "best_threshold": 0.75})
    assert mask_metrics(0.75 - moving.float() * 0.5, moving)["auc"] == 0
    constant = mask_metrics(torch.full(moving.shape, 0.5), moving)
    assert constant["auc"] == 0.5 and constant["iou"] == 0 and constant["best_iou"] == pytest.approx(float(moving.double().mean()))
    nothing, everything = torch.zeros_like(moving), torch.ones_like(moving)
    assert all(math.isnan(value) for value in mask_metrics(moving.float(), nothing).values())
    assert math.isnan(mask_metrics(moving.float(), everything)["auc"])
    assert set(mask_metrics(moving * math.nan, moving)) == set(METRICS)


def test_monotone_maps_leave_the_order_alone():
    motion, moving = scores(20)
    first, second = mask_metrics(motion, moving), mask_metrics((4 * motion).exp() / 100, moving)
    assert first["auc"] == second["auc"] and first["best_iou"] == second["best_iou"]


def test_patches_move_if_more_than_half_of_them_does():
    dynamic = torch.zeros(1, 28, 42, dtype=torch.bool)
    dynamic[0, :14, :7] = True  # exactly half
    dynamic[0, :14, 14:22] = True  # more
    dynamic[0, 14:, 28:] = True  # all
    assert moving_patches(dynamic, (2, 3)).tolist() == [[[False, True, False], [False, False, True]]]
