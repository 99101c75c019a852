"""Each loss against loops written from its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from page4d.data.sample import Sample
from page4d.geometry import encode_pose, unproject
from page4d.training.config import LossConfig
from page4d.training.losses import (
    camera_loss,
    depth_loss,
    mask_loss,
    point_loss,
    sanitise,
    total_loss,
    track_loss,
    without_largest,
)
from page4d.training.targets import collate, normalise

B, S, H, W = 2, 3, 12, 14


def sequence(seed, **changes) -> Sample:
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(S, 3, 3, generator=g)).Q
    rotation = rotation * torch.linalg.det(rotation)[:, None, None]
    extrinsics = torch.cat([rotation, torch.randn(S, 3, 1, generator=g) * 4], -1)
    intrinsics = torch.tensor([[20.0, 0, W / 2], [0, 22.0, H / 2], [0, 0, 1]]).expand(S, 3, 3)
    depth = 2 + 3 * torch.rand(S, H, W, generator=g)
    values = {
        "images": torch.rand(S, 3, H, W, generator=g), "extrinsics": extrinsics, "intrinsics": intrinsics, "depth": depth,
        "world_points": unproject(depth, extrinsics, intrinsics), "valid": torch.rand(S, H, W, generator=g) > 0.2,
        "dynamic": torch.rand(S, H, W, generator=g) > 0.7,
        "tracks": torch.rand(S, 5, 2, generator=g) * 10, "track_points": torch.randn(S, 5, 3, generator=g),
        "track_visible": torch.rand(S, 5, generator=g) > 0.3,
    }  # fmt: skip
    return Sample(**(values | changes))


@pytest.fixture
def batch() -> Sample:
    return normalise(collate([sequence(0), sequence(1)]))


def test_normalised_targets_agree(batch):
    """The first camera is the origin, the mean distance of valid points is 1, and depth, cameras and points agree."""
    eye = torch.eye(4)[:3].expand(B, 3, 4)
    assert torch.allclose(batch.extrinsics[:, 0], eye, atol=1e-6)
    for b in range(B):
        distance = batch.world_points[b].norm(dim=-1)[batch.valid[b]]
        assert abs(float(distance.mean()) - 1) < 1e-4
    lifted = unproject(batch.depth, batch.extrinsics, batch.intrinsics)
    assert torch.allclose(lifted[batch.valid], batch.world_points[batch.valid], atol=1e-5)
    assert (batch.depth[~batch.valid] == 0).all() and (batch.world_points[~batch.valid] == 0).all()


def test_normalise_does_not_depend_on_the_world(batch):
    """Another world frame or unit of length gives the same targets."""
    turn, shift = torch.linalg.qr(torch.randn(3, 3)).Q, torch.randn(3)
    turn = turn * torch.linalg.det(turn)
    moved = []
    for seed in (0, 1):
        x = sequence(seed)
        rotation = x.extrinsics[:, :, :3] @ turn.T
        translation = 7 * (x.extrinsics[:, :, 3] - torch.einsum("sij,j->si", rotation, shift))
        moved.append(
            sequence(seed, extrinsics=torch.cat([rotation, translation[..., None]], -1), depth=7 * x.depth,
                     world_points=7 * (x.world_points @ turn.T + shift), track_points=7 * (x.track_points @ turn.T + shift))
        )  # fmt: skip
    other = normalise(collate(moved))
    for name in ("extrinsics", "depth", "world_points", "track_points"):
        assert torch.allclose(getattr(other, name), getattr(batch, name), atol=2e-4), name


def test_targets_are_finite_for_bad_data():
    broken = sequence(0)
    broken.world_points[1, 2, 3] = torch.nan
    nothing = sequence(1)
    nothing.valid[0] = False
    both = normalise(collate([broken, nothing]))
    assert all(torch.isfinite(x).all() for x in (both.extrinsics, both.world_points, both.depth))
    assert not both.valid[1].any() and both.valid[0].any()
    turned = sequence(2)
    turned.extrinsics[1, 0, 0] = torch.nan
    both = normalise(collate([turned, sequence(3)]))
    assert all(torch.isfinite(x).all() for x in (both.extrinsics, both.world_points, both.depth))
    assert not both.valid[0].any() and both.valid[1].any()


@pytest.mark.parametrize("size, scale", [(1e-9, 1e-6), (1e9, 1e6)])
def test_the_scale_of_tiny_and_huge_scenes_is_clamped(size, scale):
    """Lengths are divided by at least 1e-6 and at most 1e6."""
    x = sequence(0)
    changed = replace(x, depth=size * x.depth, world_points=size * x.world_points,
                      extrinsics=torch.cat([x.extrinsics[..., :3], size * x.extrinsics[..., 3:]], -1))  # fmt: skip
    found = normalise(collate([changed]))
    assert torch.allclose(found.depth[found.valid], size * x.depth[None][found.valid] / scale, rtol=1e-4)


def test_bad_values_become_zero_and_the_largest_are_left_out():
    assert sanitise(torch.tensor([math.nan, math.inf, -math.inf, 1e4, -1e4, 3.0])).tolist() == [0, 0, 0, 100, -100, 3]
    few = torch.rand(1000)
    assert torch.equal(without_largest(few), few)
    many = torch.randperm(5000).float() / 100
    rank = round(0.98 * 4999) + 1
    kept = without_largest(many)
    assert torch.equal(kept, many[many < many.sort().values[rank - 1]]) and len(kept) == rank - 1
    same = torch.ones(3000)  # nothing is smaller than the threshold
    assert torch.equal(without_largest(same), same)


def test_camera_loss_is_that_of_loops(batch):
    predicted = torch.randn(4, B, S, 9)
    wanted = encode_pose(batch.extrinsics, batch.intrinsics, (H, W))
    expected = 0.0
    for i in range(4):
        terms = [(predicted[i] - wanted)[..., part].abs().mean() for part in (slice(0, 3), slice(3, 7), slice(7, 9))]
        expected += 0.6 ** (3 - i) * float(terms[0] + terms[1] + 0.5 * terms[2]) / 4
    assert abs(float(camera_loss(predicted, batch)) - expected) < 1e-5
    batch.valid[1, 0].flatten()[100:] = False  # at most 100 valid pixels: the sequence is left out
    alone = normalise(collate([sequence(0)]))
    assert abs(float(camera_loss(predicted, batch)) - float(camera_loss(predicted[:, :1], alone))) < 1e-5
    batch.valid[:] = False
    assert float(camera_loss(predicted, batch)) == 0


def test_depth_loss_is_that_of_loops(batch):
    depth, confidence = torch.rand(B, S, H, W, 1) + 0.5, 1 + torch.rand(B, S, H, W)
    regression, confident = [], []
    gradient = 0.0
    for b, s, y, x in torch.cartesian_prod(*(torch.arange(n) for n in (B, S, H, W))).tolist():
        if batch.valid[b, s, y, x]:
            e, k = abs(float(depth[b, s, y, x, 0] - batch.depth[b, s, y, x])), float(confidence[b, s, y, x])
            regression.append(e)
            confident.append(0.3 * e * k - 0.06 * math.log(k))
    error = depth[..., 0] - batch.depth
    for stride in (1, 2, 4, 8):
        total, count = 0.0, 0
        for b, s in torch.cartesian_prod(torch.arange(B), torch.arange(S)).tolist():
            e, m = error[b, s, ::stride, ::stride], batch.valid[b, s, ::stride, ::stride]
            count += int(m.sum())
            for y in range(m.shape[0]):
                for x in range(m.shape[1]):
                    for dy, dx in ((0, 1), (1, 0)):
                        if y + dy < m.shape[0] and x + dx < m.shape[1] and m[y, x] and m[y + dy, x + dx]:
                            total += abs(float(e[y + dy, x + dx] - e[y, x]))
        gradient += total / count / 4
    expected = sum(confident) / len(confident) + sum(regression) / len(regression) + gradient
    assert abs(float(depth_loss(depth, confidence, batch)) - expected) < 1e-4
    batch.valid[:] = False
    assert float(depth_loss(depth, confidence, batch)) == 0


def test_point_loss_is_that_of_loops(batch):
    points, confidence = torch.randn(B, S, H, W, 3), 1 + torch.rand(B, S, H, W)
    error = (points - batch.world_points)[batch.valid].norm(dim=-1)
    k = confidence[batch.valid]
    expected = float((error * k - 0.2 * k.log()).mean() + error.mean())
    for stride in (1, 2, 4):
        cosines = []
        for b, s in torch.cartesian_prod(torch.arange(B), torch.arange(S)).tolist():
            a, t, m = (v[b, s, ::stride, ::stride] for v in (points, batch.world_points, batch.valid))
            for y in range(m.shape[0]):
                for x in range(m.shape[1]):
                    around = [(-1, 0), (0, -1), (1, 0), (0, 1)]  # up, left, down, right: each crossed with the next
                    for (y1, x1), (y2, x2) in zip(around, around[1:] + around[:1], strict=True):
                        p, q = (y + y1, x + x1), (y + y2, x + x2)
                        if not all(0 <= i < m.shape[0] and 0 <= j < m.shape[1] and m[i, j] for i, j in (p, q, (y, x))):
                            continue
                        normals = [torch.linalg.cross(v[p] - v[y, x], v[q] - v[y, x]) for v in (a, t)]
                        cosines.append(float(torch.nn.functional.cosine_similarity(*normals, dim=0)))
        expected += (1 - sum(cosines) / len(cosines)) / 3 if len(cosines) >= 10 else 0
    assert abs(float(point_loss(points, confidence, batch)) - expected) < 1e-4


def test_track_loss_is_that_of_loops(batch):
    tracks, visibility = torch.rand(3, B, S, 5, 2) * 10, torch.rand(B, S, 5)
    seen = batch.track_visible
    expected = float(-(visibility[seen].log().sum() + (1 - visibility[~seen]).log().sum()) / seen.numel())
    for i in range(3):
        expected += 0.8 ** (2 - i) * float((tracks[i] - batch.tracks)[seen].abs().mean()) / W / 3
    assert abs(float(track_loss(tracks, visibility, batch)) - expected) < 1e-5


def test_without_a_visible_track_only_visibility_is_learnt(batch):
    """Gradients stay finite."""
    tracks = torch.zeros(3, B, S, 5, 2, requires_grad=True)
    visibility, nothing = torch.full((B, S, 5), 0.25), replace(batch, track_visible=torch.zeros(B, S, 5, dtype=torch.bool))
    loss = track_loss(tracks, visibility, nothing)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(0.75)) and (tracks.grad == 0).all()


def test_one_wild_prediction_is_worth_at_most_100(batch):
    """A single error of 10^6 changes the mean of n errors by 100 / n, as each error is clamped."""
    wanted = encode_pose(batch.extrinsics, batch.intrinsics, (H, W))
    for index, n, weight in ((0, B * S * 3, 1.0), (8, B * S * 2, 0.5)):
        wild = wanted[None].clone()
        wild[0, 0, 0, index] += 1e6
        clamped = 100 / n if index == 0 else 100  # rotations and fields of view: the mean is clamped
        assert float(camera_loss(wild, batch)) == pytest.approx(weight * clamped, rel=1e-4)
    n = int(batch.valid.sum())
    y, x = batch.valid[0, 0].nonzero()[0].tolist()
    depth, confidence = batch.depth[..., None].clone(), torch.ones(B, S, H, W)
    depth[0, 0, y, x] += 1e6
    confidence[0, 0, y, x] = 10
    neighbours = 0.0
    for stride in (1, 2, 4, 8):
        if y % stride == 0 and x % stride == 0:
            m = batch.valid[0, 0]
            around = [(y + dy, x + dx) for dy, dx in ((0, stride), (stride, 0), (0, -stride), (-stride, 0))]
            count = sum(bool(m[p]) for p in around if 0 <= p[0] < H and 0 <= p[1] < W)
            neighbours += 100 * count / int(batch.valid[..., ::stride, ::stride].sum()) / 4
    assert float(depth_loss(depth, confidence, batch)) == pytest.approx((100 + 100) / n + neighbours, rel=1e-4)
    tracks = batch.tracks[None].clone()
    first = batch.track_visible.nonzero()[0].tolist()
    tracks[0, first[0], first[1], first[2], 0] += 1e6
    certain = batch.track_visible.float()
    assert float(track_loss(tracks, certain, batch)) == pytest.approx(100 / (2 * int(batch.track_visible.sum())), rel=1e-3)


@pytest.mark.parametrize("size", [0, 1e-7, 1e-6, 1e-5])
def test_gradients_of_coinciding_points_are_bounded(batch, size):
    """The normals of points that (nearly) coincide have no gradient. It would outweigh all others."""
    points = (0.5 + size * torch.randn(B, S, H, W, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    point_loss(points, torch.ones(B, S, H, W), batch).backward()
    assert points.grad.abs().max() < 10


def test_mask_loss_wants_static_patches_high_and_moving_ones_low(batch):
    """The target of a patch is its fraction of static pixels."""
    moving = batch.dynamic.float().unflatten(2, (3, 4)).unflatten(4, (2, 7)).mean((3, 5))
    assert float(mask_loss(0.49 - 0.98 * moving.round(), batch)) < float(mask_loss(0.98 * moving.round() - 0.49, batch))
    mask = torch.rand(B, S, 3, 2) - 0.5
    expected = -((1 - moving) * (mask + 0.5).log() + moving * (0.5 - mask).log()).mean()
    assert abs(float(mask_loss(mask, batch)) - float(expected)) < 1e-5
    mask[0, 0, 0, 0] = math.nan  # no assertion: the trainer reports it
    assert math.isnan(float(mask_loss(mask, batch)))


def test_the_total_is_the_weighted_sum(batch):
    from page4d.prediction import Prediction

    prediction = Prediction(
        batch.images, pose_enc_list=torch.randn(4, B, S, 9), depth=torch.rand(B, S, H, W, 1), depth_conf=torch.ones(B, S, H, W)
    )
    found = total_loss(prediction, batch, LossConfig(camera=5, depth=2, points=0))
    assert set(found) == {"loss", "camera", "depth"}
    assert torch.allclose(found["loss"], 5 * found["camera"] + 2 * found["depth"])
