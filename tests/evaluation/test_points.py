from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from page4d.evaluation.points import METRICS, nearest_distances, point_metrics
from page4d.geometry import umeyama


def clouds(n: int = 700) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(n, 3, generator=generator)
    rotation = torch.from_numpy(Rotation.random(random_state=1).as_matrix()).float()
    return 0.2 * (true + 0.1 * torch.randn(n, 3, generator=generator)) @ rotation.mT + 4, true


def test_distances_are_those_of_a_tree():
    predicted, true = clouds()
    aligned = umeyama(predicted, true).apply(predicted.double()).numpy()
    accuracy, _ = cKDTree(true.double().numpy()).query(aligned)
    completeness, _ = cKDTree(aligned).query(true.double().numpy())
    found = point_metrics(predicted, true)
    assert found["accuracy"] == pytest.approx(accuracy.mean()) and found["completeness"] == pytest.approx(completeness.mean())
    lower = (len(true) - 1) // 2
    assert found["accuracy_median"] == pytest.approx(np.sort(accuracy)[lower])
    assert found["completeness_median"] == pytest.approx(np.sort(completeness)[lower])


@pytest.mark.parametrize("chunk", [1, 64, 5000])
def test_chunks_do_not_change_nearest_distances(chunk):
    predicted, true = (cloud.double() + 1000 for cloud in clouds(150))
    expected, _ = cKDTree(true.numpy()).query(predicted.numpy())
    assert np.allclose(nearest_distances(predicted, true, chunk), expected, rtol=1e-9)


def test_a_similarity_costs_nothing():
    _, true = clouds()
    rotation = torch.from_numpy(Rotation.random(random_state=2).as_matrix()).float()
    found = point_metrics(0.01 * true @ rotation.mT - 7, true)
    assert max(found.values()) < 1e-4


def test_the_limit_is_seeded():
    predicted, true = clouds()
    limited = [point_metrics(predicted, true, max_points=100, seed=seed) for seed in (3, 3, 4)]
    assert limited[0] == limited[1] != limited[2]
    assert limited[0]["accuracy"] > point_metrics(predicted, true)["accuracy"]  # thinner clouds are farther apart
    assert point_metrics(predicted, true, max_points=700, seed=1) == point_metrics(predicted, true, max_points=700, seed=2)


def test_metrics_are_nan_without_anything_to_compare():
    predicted, true = clouds(5)
    for bad in (point_metrics(predicted[:0], true[:0]), point_metrics(predicted * math.nan, true)):
        assert set(bad) == set(METRICS) and all(math.isnan(value) for value in bad.values())
    one = point_metrics(predicted[:1], true[:1])
    assert one["accuracy"] == pytest.approx(0, abs=1e-12)
