from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evo.core import geometry, metrics
from evo.core.trajectory import PosePath3D
from evo.core.units import Unit
from scipy.spatial.transform import Rotation

from page4d.evaluation.pose import pose_metrics, rotation_angle, trajectory
from page4d.geometry import umeyama


def path(extrinsics: torch.Tensor) -> PosePath3D:
    """evo's trajectory, made with numpy's inverse of the 4 x 4 matrices."""
    matrices = np.tile(np.eye(4), (len(extrinsics), 1, 1))
    matrices[:, :3] = extrinsics.numpy()
    return PosePath3D(poses_se3=list(np.linalg.inv(matrices)))


def by_evo(predicted: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    estimate, reference = path(predicted), path(true)
    estimate.align(reference, correct_scale=True)
    found = {}
    for name, metric in {
        "ate": metrics.APE(metrics.PoseRelation.translation_part),
        "rpe_trans": metrics.RPE(metrics.PoseRelation.translation_part, 1, Unit.frames, all_pairs=True),
        "rpe_rot": metrics.RPE(metrics.PoseRelation.rotation_angle_deg, 1, Unit.frames, all_pairs=True),
    }.items():
        metric.process_data((reference, estimate))
        found[name] = metric.get_statistic(metrics.StatisticsType.rmse)
    return found


def moved(extrinsics: torch.Tensor, scale: float, seed: int = 9) -> torch.Tensor:
    """The same cameras in a world that is turned, shifted and scaled."""
    rotation = torch.from_numpy(Rotation.random(random_state=seed).as_matrix())
    world_rotation, centres = trajectory(extrinsics)
    turned, centres = rotation @ world_rotation, scale * centres @ rotation.mT + torch.tensor([3.0, -20.0, 5.0], dtype=torch.float64)
    return torch.cat([turned.mT, -turned.mT @ centres[..., None]], -1)


@pytest.mark.parametrize("frames", [3, 4, 50])
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_metrics_are_those_of_evo(poses, frames, noise):
    for seed in range(5):
        true = poses(frames, seed)
        predicted = moved(true, 0.3)
        predicted = torch.cat([poses(frames, seed + 100, angle=noise)[..., :3] @ predicted[..., :3], predicted[..., 3:]], -1)
        predicted[..., 3] += noise * torch.randn(frames, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ours, theirs = pose_metrics(predicted, true), by_evo(predicted, true)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name


def test_umeyama_is_that_of_evo_and_scipy_also_with_a_reflection(poses):
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(20, 3, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0])
    target = source * torch.tensor([1.0, 1.0, -1.0]) * 2 + 5  # a mirror image: no motion fits
    found = umeyama(source, target)
    assert torch.det(found.rotation) == pytest.approx(1)
    rotation, translation, scale = geometry.umeyama_alignment(source.numpy().T, target.numpy().T, with_scale=True)
    assert np.allclose(found.rotation, rotation) and np.allclose(found.translation, translation)
    assert float(found.scale) == pytest.approx(scale)
    best, _ = Rotation.align_vectors((target - target.mean(0)).numpy(), (source - source.mean(0)).numpy())
    assert np.allclose(found.rotation, best.as_matrix())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_similarity_of_the_world_costs_nothing(poses, scale):
    true = poses(12, 0)
    found = pose_metrics(moved(true, scale), true)
    assert max(found["ate"], found["rpe_trans"], found["rpe_rot"]) < 1e-6
    assert found["ate_constant"] > 0.1


def test_units_scale_the_errors(poses):
    true, predicted = poses(12, 0), poses(12, 1)
    ours, larger = pose_metrics(predicted, true), pose_metrics(predicted, torch.cat([true[..., :3], 7 * true[..., 3:]], -1))
    for name, factor in {"ate": 7, "rpe_trans": 7, "rpe_rot": 1, "ate_constant": 7}.items():
        assert larger[name] == pytest.approx(factor * ours[name]), name


def test_ate_constant_is_the_error_of_a_static_camera(poses):
    true = poses(15, 2)
    centres = path(true).positions_xyz
    by_hand = math.sqrt(((centres - centres.mean(0)) ** 2).sum(1).mean())
    for guess in (torch.eye(4)[:3].expand(15, 3, 4), true[4:5].expand(15, 3, 4)):
        found = pose_metrics(guess, true)
        assert found["ate"] == pytest.approx(by_hand) and found["ate_constant"] == pytest.approx(by_hand)
    assert pose_metrics(torch.eye(4)[:3].expand(15, 3, 4), true)["rpe_rot"] > 1


def test_degenerate_sequences(poses):
    one = pose_metrics(poses(1, 0), poses(1, 1))
    assert one["ate"] < 1e-12 and math.isnan(one["rpe_trans"]) and math.isnan(one["rpe_rot"])
    two = pose_metrics(poses(2, 0), poses(2, 1))
    assert two["ate"] == pytest.approx(0, abs=1e-12) and two["rpe_trans"] > 0 and two["rpe_rot"] > 0
    still = pose_metrics(poses(5, 0), torch.eye(4)[:3].expand(5, 3, 4))
    assert still["ate"] == pytest.approx(0, abs=1e-12) and still["ate_constant"] == 0 and still["rpe_rot"] > 0
    straight = poses(6, 3)
    straight[:, :, 3] = -(straight[:, :, :3] @ (torch.arange(6.0, dtype=torch.float64)[:, None, None] * torch.ones(3, 1))).squeeze(-1)
    found = pose_metrics(moved(straight, 2.0), straight)
    assert max(found["ate"], found["rpe_trans"], found["rpe_rot"]) < 1e-6


def test_predictions_that_are_not_finite_give_nan(poses):
    bad = poses(4, 0)
    bad[2, 0, 3] = math.inf
    assert all(math.isnan(value) for value in pose_metrics(bad, poses(4, 1)).values())


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, 3.0, math.pi])
def test_rotation_angle(angle):
    rotation = torch.from_numpy(Rotation.from_rotvec(angle * np.array([0.6, 0.0, 0.8])).as_matrix())
    assert float(rotation_angle(rotation)) == pytest.approx(angle, rel=1e-6, abs=1e-12)
