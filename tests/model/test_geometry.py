from __future__ import annotations

import math

import pytest
import torch

from page4d.geometry import decode_pose, encode_pose, matrix_to_quaternion, quaternion_to_matrix, unproject
from page4d.prediction import Cameras

AXES = {"x": (1.0, 0, 0), "y": (0, 1.0, 0), "z": (0, 0, 1.0)}


def rotation_about(axis: str, angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    rows = {"x": [[1, 0, 0], [0, c, -s], [0, s, c]], "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]], "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]]}
    return torch.tensor(rows[axis], dtype=torch.float64)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("angle", [-3.1, -1.0, 0.0, 0.3, 2.0, math.pi])
def test_quaternions_about_an_axis(axis, angle):
    vector = torch.tensor(AXES[axis], dtype=torch.float64)
    expected = torch.cat([vector * math.sin(angle / 2), torch.tensor([math.cos(angle / 2)], dtype=torch.float64)])
    assert torch.allclose(quaternion_to_matrix(expected), rotation_about(axis, angle), atol=1e-12)
    found = matrix_to_quaternion(rotation_about(axis, angle))
    assert found[3] >= 0 and min((found - expected).norm(), (found + expected).norm()) < 1e-7


def test_random_rotations_round_trip():
    quaternions = torch.randn(1000, 4, dtype=torch.float64)
    quaternions = quaternions / quaternions.norm(dim=-1, keepdim=True)
    matrices = quaternion_to_matrix(quaternions)
    assert torch.allclose(matrices @ matrices.transpose(-1, -2), torch.eye(3, dtype=torch.float64), atol=1e-12)
    signs = torch.where(quaternions[:, 3:] < 0, -1.0, 1.0)
    assert torch.allclose(matrix_to_quaternion(matrices), quaternions * signs, atol=1e-9)
    assert torch.allclose(quaternion_to_matrix(3 * quaternions), matrices, atol=1e-12)  # normalised inside


def cameras():
    extrinsics = torch.cat([rotation_about("y", 0.4) @ rotation_about("x", -0.2), torch.tensor([[0.3], [-0.1], [2.0]])], 1)
    intrinsics = torch.tensor([[80.0, 0, 28], [0, 90.0, 21], [0, 0, 1]], dtype=torch.float64)
    return extrinsics[None, None], intrinsics[None, None]


def test_pose_encoding_round_trip():
    extrinsics, intrinsics = cameras()
    encoded = encode_pose(extrinsics, intrinsics, (42, 56))
    assert encoded.shape == (1, 1, 9) and encoded.dtype == torch.float32
    assert encoded[0, 0, 7] == pytest.approx(2 * math.atan(21 / 90)) and encoded[0, 0, 8] == pytest.approx(2 * math.atan(28 / 80))
    for decoded, expected in zip(decode_pose(encoded, (42, 56)), (extrinsics, intrinsics), strict=True):
        assert torch.allclose(decoded.double(), expected, atol=1e-4)


def test_unprojected_points_project_back():
    extrinsics, intrinsics = cameras()
    depth = torch.rand(1, 1, 42, 56, dtype=torch.float64) + 0.5
    points = unproject(depth, extrinsics, intrinsics)
    in_camera = points @ extrinsics[0, 0, :, :3].T + extrinsics[0, 0, :, 3]
    pixels = in_camera @ intrinsics[0, 0].T
    v, u = torch.meshgrid(torch.arange(42.0), torch.arange(56.0), indexing="ij")
    assert torch.allclose(pixels[..., 0] / pixels[..., 2], u.double(), atol=1e-9)
    assert torch.allclose(pixels[..., 1] / pixels[..., 2], v.double(), atol=1e-9)
    assert torch.allclose(pixels[..., 2], depth, atol=1e-12)


def test_camera_centres_map_to_the_origin():
    extrinsics, intrinsics = cameras()
    c = Cameras(extrinsics, intrinsics)
    origin = extrinsics[0, 0, :, :3] @ c.centers[0, 0] + extrinsics[0, 0, :, 3]
    assert origin.abs().max() < 1e-12
    assert torch.allclose(c.world_from_camera[0, 0, :, 3], c.centers[0, 0])
