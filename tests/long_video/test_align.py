"""The similarity between two reconstructions of the same frames, on points and cameras whose relation is known."""

from __future__ import annotations

import math

import pytest
import torch

from page4d.geometry import Similarity, quaternion_to_matrix, umeyama
from page4d.long_video.align import AlignmentError, from_cameras, sim3, weighted_median


def known(seed: int) -> Similarity:
    generator = torch.Generator().manual_seed(seed)
    quaternion = torch.randn(4, generator=generator, dtype=torch.float64)
    scale = torch.rand((), generator=generator, dtype=torch.float64) * 3 + 0.2
    return Similarity(scale, quaternion_to_matrix(quaternion), 5 * torch.randn(3, generator=generator, dtype=torch.float64))


def cloud(count: int, seed: int, axes=(3.0, 2.0, 1.0)) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * torch.tensor(
        axes, dtype=torch.float64
    )


def error(found: Similarity, true: Similarity) -> float:
    """The largest of: relative error of the scale, angle in radians, shift of the cloud's middle in units of its size."""
    cosine = ((found.rotation.mT @ true.rotation).trace() - 1) / 2
    middle = (found.translation - true.translation).norm() / (3 * true.scale)
    return max(abs(float(found.scale / true.scale) - 1), math.acos(min(1.0, float(cosine))), float(middle))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("axes", [(3, 2, 1), (3, 2, 0), (3, 0.02, 0)], ids=["solid", "plane", "nearly a line"])
def test_exact_points_give_the_exact_similarity(seed, axes):
    a, true = cloud(100, seed, axes) + 7, known(seed)
    assert error(sim3(a, true.apply(a)), true) < 1e-7
    assert error(sim3(a.float(), true.apply(a).float()), true) < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_a_third_of_gross_errors_hardly_matters(seed):
    a, true = cloud(1500, seed), known(seed)
    b = true.apply(a) + 0.01 * true.scale * cloud(1500, seed + 50, (1, 1, 1))
    b[:500] += 4 * true.scale * torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64) + true.scale * cloud(500, seed + 90)
    assert error(sim3(a, b, rounds=0), true) > 0.2
    assert error(sim3(a, b), true) < 0.02


def test_weights_leave_pairs_out():
    a, true = cloud(400, 0), known(0)
    b = true.apply(a)
    b[200:] = cloud(200, 7) * 9
    weights = (torch.arange(400) < 200).double()
    assert error(sim3(a, b, weights), true) < 1e-7
    assert error(sim3(a, b, 17 * weights), true) < 1e-7, "only their ratios count"
    b[:50], a[60] = float("nan"), float("inf")
    assert error(sim3(a, b, weights), true) < 1e-7


def test_a_noiseless_majority_is_found_at_once():
    a, true = cloud(100, 1), known(1)
    b = true.apply(a)
    b[:5] += 100
    assert error(sim3(a, b), true) < 2e-2


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (torch.ones(50, 3), "on a line or in one place"),
        (torch.linspace(0, 1, 50)[:, None] * torch.tensor([[1.0, 2.0, 3.0]]), "on a line or in one place"),
        (torch.rand(15, 3), "only 15 common points count, and 16 are needed"),
        (torch.full((50, 3), float("nan")), "only 0 common points count"),
    ],
    ids=["one place", "a line", "few", "nan"],
)
def test_points_that_determine_nothing(points, words):
    with pytest.raises(AlignmentError, match=words):
        sim3(points, points)


def cameras(count: int, seed: int, still: bool = False, turning: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = quaternion_to_matrix(torch.randn(count if turning else 1, 4, generator=generator, dtype=torch.float64)).expand(count, 3, 3)
    centres = torch.randn(1 if still else count, 3, generator=generator, dtype=torch.float64).expand(count, 3)
    return torch.cat([rotation, -(rotation @ centres[..., None])], -1)


def seen_from(extrinsics: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """The same cameras in the other world: x_cam = s (R_a x_a + t_a) there."""
    rotation = extrinsics[..., :3] @ similarity.rotation.mT
    translation = similarity.scale * extrinsics[..., 3] - rotation @ similarity.translation
    return torch.cat([rotation, translation[..., None]], -1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("turning", [True, False], ids=["turning", "gliding"])
def test_cameras(seed, turning):
    a, true = cameras(6, seed, turning=turning), known(seed)
    b = seen_from(a, true)
    points = cloud(10, seed)
    assert torch.allclose(true.apply(points) @ b[0, :, :3].mT + b[0, :, 3], true.scale * (points @ a[0, :, :3].mT + a[0, :, 3])), (
        "the stand-in is right"
    )
    assert error(from_cameras(a, b), true) < 1e-7
    assert error(from_cameras(a, b, true.scale), true) < 1e-7


def test_cameras_that_stand_still_need_the_ratio_of_depths():
    a, true = cameras(6, 0, still=True), known(0)
    b = seen_from(a, true)
    with pytest.raises(AlignmentError, match="stand still or disagree, and there is no common depth"):
        from_cameras(a, b)
    assert error(from_cameras(a, b, float(true.scale)), true) < 1e-7


def test_the_weighted_median():
    values = torch.tensor([5.0, 1.0, 3.0])
    assert weighted_median(values, torch.tensor([1.0, 1.0, 1.0])) == 3
    assert weighted_median(values, torch.tensor([9.0, 1.0, 1.0])) == 5
    assert weighted_median(values, torch.tensor([0.0, 1.0, 0.0])) == 1


def test_what_does_not_agree_is_refused():
    a = cloud(200, 0, (1, 1, 1))
    for b, words in (
        (cloud(200, 9), "do not agree"),
        (a * torch.tensor([1.0, 1.0, -1.0]), "do not agree"),  # a mirror image
        (torch.linspace(0, 1, 200)[:, None] * torch.ones(3), "on a line"),
    ):
        with pytest.raises(AlignmentError, match=words):
            sim3(a, b)


def test_far_points_of_little_weight_and_points_of_no_weight():
    a, true = cloud(200, 0), known(0)
    a[0] = torch.tensor([0.0, 0.0, 1e13])
    b = true.apply(a)
    assert error(sim3(a, b, 1 / (1 + a.square().sum(1))), true) < 1e-3
    weights = torch.ones(200, dtype=torch.float64)
    weights[0] = 0
    assert error(umeyama(a, b, weights), true) < 1e-7
    a[0] = float("nan")
    assert error(umeyama(a, b, weights), true) < 1e-7
    weights[3] = float("nan")
    assert error(sim3(a, b, weights), true) < 1e-7
    for wrong in (torch.zeros(200), -weights, weights):
        with pytest.raises(ValueError, match="weights must be finite"):
            umeyama(a, b, wrong)


def test_a_heavy_minority_outweighs_a_light_majority():
    a, true = cloud(400, 2), known(2)
    b = true.apply(a)
    b[100:] += 5 * true.scale
    weights = torch.where(torch.arange(400) < 100, 30.0, 1.0)
    assert error(sim3(a, b, weights), true) < 0.05


def test_units_do_not_matter_and_points_keep_their_type():
    a, true = cloud(100, 0), known(0)
    for unit in (1e-6, 1e8):
        found = sim3(a * unit, true.apply(a))
        assert error(Similarity(found.scale * unit, *found[1:]), true) < 1e-6
    assert found.apply(a.float()).dtype == torch.float32


@pytest.mark.parametrize("unit", [1e-7, 1.0, 1e7])
def test_cameras_in_any_unit(unit):
    a, true = cameras(6, 0), known(0)
    b = seen_from(a, true)
    a = torch.cat([a[..., :3], a[..., 3:] * unit], -1)
    found = from_cameras(a, b)
    assert error(Similarity(found.scale * unit, *found[1:]), true) < 1e-6


def test_cameras_that_say_nothing():
    a = cameras(8, 0, still=True, turning=False)
    jitter = [a.clone() for _ in range(2)]
    for seed, x in enumerate(jitter):
        x[..., 3] += 10.0 ** -(4 + seed) * torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.raises(AlignmentError, match="stand still or disagree"):
        from_cameras(*jitter)
    moving = cameras(8, 1)
    for first, second in ((moving, a), (a, moving)):
        with pytest.raises(AlignmentError, match="stand still or disagree"):
            from_cameras(first, second)
    for ratio in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(AlignmentError, match="the ratio of the depths is"):
            from_cameras(moving, moving, ratio)
    with pytest.raises(AlignmentError, match="not finite"):
        from_cameras(moving * float("nan"), moving)


def test_the_mean_of_far_rotations_is_a_rotation():
    """Half turns about the three axes: their mean is a reflection."""
    turns = torch.stack([2 * torch.outer(axis, axis) - torch.eye(3) for axis in torch.eye(3)]).double()
    a = torch.cat([turns, torch.zeros(3, 3, 1, dtype=torch.float64)], -1)
    b = torch.cat([torch.eye(3).double().expand(3, 3, 3), torch.zeros(3, 3, 1, dtype=torch.float64)], -1)
    assert torch.det(from_cameras(a, b, 1.0).rotation) == pytest.approx(1)
