from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize_scalar

from page4d.evaluation.depth import (
    ALIGNMENTS,
    align_median,
    align_metric,
    align_scale,
    align_scale_shift,
    align_scale_shift_adam,
    depth_metrics,
)


def depths(n: int = 301, seed: int = 0, outliers: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true depths (n,) fp32: a linear relation, noise, and a fraction of outliers."""
    generator = torch.Generator().manual_seed(seed)
    predicted = 0.5 + 2 * torch.rand(n, generator=generator)
    true = 3 * predicted + 0.7 + 0.1 * torch.randn(n, generator=generator)
    far = torch.rand(n, generator=generator) < outliers
    return predicted, torch.where(far, 60 * torch.rand(n, generator=generator) + 0.1, true).clamp_min(0.05)


def test_metrics_are_those_of_plain_python():
    predicted, true = [1.0, 2.0, -1.0, 5.0, 3.0], [1.2, 1.0, 2.0, 5.0, 4.0]
    found = depth_metrics(torch.tensor(predicted), torch.tensor(true))
    n = len(true)
    pairs = list(zip(predicted, true, strict=True))
    floored = [(max(p, 1e-5), g) for p, g in pairs]
    expected = {
        "abs_rel": sum(abs(p - g) / g for p, g in pairs) / n,
        "sq_rel": sum((p - g) ** 2 / g for p, g in pairs) / n,
        "rmse": math.sqrt(sum((p - g) ** 2 for p, g in pairs) / n),
        "log_rmse": math.sqrt(sum((math.log(p) - math.log(g)) ** 2 for p, g in floored) / n),
        **{f"delta{k}": sum(max(p / g, g / p) < 1.25**k for p, g in floored) / n for k in (1, 2, 3)},
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected["delta1"] == 0.4 and expected["delta2"] == 0.6


def test_a_perfect_prediction_has_no_error_and_an_empty_one_no_metrics():
    true = torch.rand(50) + 0.1
    perfect = depth_metrics(true, true)
    assert [perfect[name] for name in ("abs_rel", "sq_rel", "rmse", "log_rmse")] == [0] * 4
    assert [perfect[f"delta{k}"] for k in (1, 2, 3)] == [1] * 3
    assert all(math.isnan(x) for x in depth_metrics(true[:0], true[:0]).values())
    assert all(math.isnan(x) for x in depth_metrics(true * math.nan, true).values())


@pytest.mark.parametrize("name", ["scale", "scale&shift", "median"])
def test_alignments_find_the_unit(name):
    true = torch.rand(200) + 0.5
    scale, shift = ALIGNMENTS[name](true / 40, true)
    assert scale == pytest.approx(40, rel=1e-5) and shift == pytest.approx(0, abs=1e-5)
    assert align_metric(true / 40, true) == (1, 0)


def test_median_is_the_lower_of_two():
    predicted, true = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([8.0, 6.0, 4.0, 100.0])
    assert align_median(predicted, true) == (6 / 2, 0)


@pytest.mark.parametrize("seed", range(3))
def test_scale_is_ten_steps_towards_the_optimum(seed):
    predicted, true = depths(seed=seed)
    p, g = predicted.double().numpy(), true.double().numpy()
    scale = g.mean() / p.mean()
    for _ in range(10):
        weight = 1 / (np.abs(scale * p - g) + 1e-8)
        scale = (weight * p * g).sum() / (weight * p**2).sum()
    assert align_scale(predicted, true)[0] == pytest.approx(scale, rel=1e-7)
    best = minimize_scalar(lambda s: np.abs(s * p - g).sum(), bounds=(0, 100), method="bounded", options={"xatol": 1e-10})
    assert np.abs(align_scale(predicted, true)[0] * p - g).sum() == pytest.approx(best.fun, rel=1e-2)


def test_scale_is_never_negative():
    assert align_scale(-torch.rand(20) - 0.1, torch.rand(20)) == (1e-3, 0)


def least_absolute(p: np.ndarray, g: np.ndarray) -> float:
    """The minimum of sum |s p + t - g| as a linear programme: minimise sum e subject to -e <= s p + t - g <= e."""
    n = len(p)
    line = np.stack([p, np.ones(n)], 1)
    above, below = np.hstack([line, -np.eye(n)]), np.hstack([-line, -np.eye(n)])
    cost, bounds = np.r_[0, 0, np.ones(n)], [(None, None)] * 2 + [(0, None)] * n
    found = linprog(cost, A_ub=np.vstack([above, below]), b_ub=np.r_[g, -g], bounds=bounds)
    return found.fun


@pytest.mark.parametrize(("n", "outliers"), [(3, 0.0), (50, 0.0), (301, 0.2), (400, 0.45)])
@pytest.mark.parametrize("seed", range(3))
def test_scale_and_shift_reach_the_optimum(n, outliers, seed):
    predicted, true = depths(n, seed, outliers)
    p, g = predicted.double().numpy(), true.double().numpy()
    scale, shift = align_scale_shift(predicted, true)
    best = least_absolute(p, g)
    assert best * (1 - 1e-9) <= np.abs(scale * p + shift - g).sum() <= best * (1 + 1e-3) + 1e-6


def test_scale_and_shift_of_equal_predictions_is_the_median():
    true = torch.tensor([1.0, 2.0, 9.0])
    scale, shift = align_scale_shift(torch.full((3,), 0.5), true)
    assert scale * 0.5 + shift == pytest.approx(2, abs=1e-5)


def test_official_scale_and_shift_is_adam_from_the_medians():
    predicted, true = depths(60)
    p, g = predicted.double().numpy(), true.double().numpy()
    line = np.array([np.sort(g)[29] / np.sort(p)[29], 0.0])
    first, second, before = np.zeros(2), np.zeros(2), math.inf
    for step in range(1, 301):
        error = line[0] * p + line[1] - g
        gradient = np.array([(np.sign(error) * p).sum(), np.sign(error).sum()])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        line -= 1e-4 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        if abs(before - np.abs(error).sum()) < 1e-6:
            break
        before = np.abs(error).sum()
    with torch.inference_mode():
        found = align_scale_shift_adam(predicted, true, steps=300)
    assert found == pytest.approx(tuple(line), rel=1e-6)
    assert found != pytest.approx(align_scale_shift(predicted, true), rel=1e-2)
