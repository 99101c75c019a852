"""Pose encoding, rotations, unprojection and similarities.

Conventions: OpenCV cameras (x right, y down, z forward); extrinsics are camera-from-world, x_cam = R x_world + t; quaternions are
(x, y, z, w); the pose encoding is [t (3), quaternion (4), fov_h, fov_w] with vertical and horizontal fields of view in radians.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in x, y, z, w order, which need not be normalised."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2 / (quaternion * quaternion).sum(-1)
    rows = [
        1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
        s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
        s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternions (..., 4) in x, y, z, w order with w >= 0 of rotation matrices (..., 3, 3).

    There are four equivalent formulas. Each matrix uses the one that divides by the largest component.
    """
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = matrix.flatten(-2).unbind(-1)
    squares = [1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22]  # 4 w^2, 4 x^2, ...
    magnitude = torch.stack(squares, -1).clamp_min(0).sqrt()
    sq = magnitude * magnitude
    candidates = torch.stack(
        [
            torch.stack([sq[..., 0], m21 - m12, m02 - m20, m10 - m01], -1),
            torch.stack([m21 - m12, sq[..., 1], m10 + m01, m02 + m20], -1),
            torch.stack([m02 - m20, m10 + m01, sq[..., 2], m12 + m21], -1),
            torch.stack([m10 - m01, m02 + m20, m12 + m21, sq[..., 3]], -1),
        ],
        -2,
    ) / (2 * magnitude.clamp_min(0.1)).unsqueeze(-1)
    best = magnitude.argmax(-1)[..., None, None].expand(*magnitude.shape[:-1], 1, 4)
    w, x, y, z = candidates.gather(-2, best).squeeze(-2).unbind(-1)
    quaternion = torch.stack([x, y, z, w], -1)
    return torch.where(w.unsqueeze(-1) < 0, -quaternion, quaternion)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Pose encodings (..., 9) fp32 of extrinsics (..., 3, 4) and intrinsics (..., 3, 3) in pixels of an (H, W) image."""
    height, width = image_size
    fov_h = 2 * torch.atan((height / 2) / intrinsics[..., 1, 1])
    fov_w = 2 * torch.atan((width / 2) / intrinsics[..., 0, 0])
    quaternion = matrix_to_quaternion(extrinsics[..., :3])
    return torch.cat([extrinsics[..., 3], quaternion, fov_h[..., None], fov_w[..., None]], -1).float()


def decode_pose(pose_enc: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Extrinsics (..., 3, 4) and intrinsics (..., 3, 3) of pose encodings (..., 9); the principal point is the image centre.

    A field of view of 0, which the network's ReLU can return, gives an infinite focal length.
    """
    height, width = image_size
    extrinsics = torch.cat([quaternion_to_matrix(pose_enc[..., 3:7]), pose_enc[..., :3, None]], -1)
    intrinsics = pose_enc.new_zeros(*pose_enc.shape[:-1], 3, 3)
    intrinsics[..., 0, 0] = (width / 2) / torch.tan(pose_enc[..., 8] / 2)
    intrinsics[..., 1, 1] = (height / 2) / torch.tan(pose_enc[..., 7] / 2)
    intrinsics[..., 0, 2] = width / 2
    intrinsics[..., 1, 2] = height / 2
    intrinsics[..., 2, 2] = 1
    return extrinsics, intrinsics


def unproject(depth: Tensor, extrinsics: Tensor, intrinsics: Tensor) -> Tensor:
    """World points (..., H, W, 3) of depth maps (..., H, W): x_world = R^T (x_cam - t), pixel centres at integer (u, v).

    Computed in float64 if the device supports it. In float32, small baselines far from the origin would lose digits. Returns depth's dtype.
    """
    height, width = depth.shape[-2:]
    dtype = torch.float32 if depth.device.type == "mps" else torch.float64
    v, u = torch.meshgrid(
        torch.arange(height, device=depth.device, dtype=dtype),
        torch.arange(width, device=depth.device, dtype=dtype),
        indexing="ij",
    )
    intrinsics, extrinsics, z = intrinsics.to(dtype), extrinsics.to(dtype), depth.to(dtype)
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    points_camera = torch.stack([(u - cx) * z / fx, (v - cy) * z / fy, z], -1)
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    return torch.einsum("...ji,...hwj->...hwi", rotation, points_camera - translation[..., None, None, :]).to(depth.dtype)


class Similarity(NamedTuple):
    """x -> scale * rotation x + translation, from one world to another."""

    scale: Tensor  # ()
    rotation: Tensor  # (3, 3)
    translation: Tensor  # (3,)

    def apply(self, points: Tensor) -> Tensor:
        """The transformed points (..., 3), in their dtype."""
        return (self.scale * points.to(self.rotation.dtype) @ self.rotation.mT + self.translation).to(points.dtype)

    def after(self, first: Similarity) -> Similarity:
        """This one after another: x -> self(first(x))."""
        return Similarity(self.scale * first.scale, self.rotation @ first.rotation, self.apply(first.translation))

    def inverse(self) -> Similarity:
        back = self.rotation.mT / self.scale
        return Similarity(1 / self.scale, self.rotation.mT, -back @ self.translation)

    def cameras(self, extrinsics: Tensor) -> Tensor:
        """Extrinsics (..., 3, 4) of the same cameras in the new world, where lengths, depths too, are `scale` times as long."""
        rotation = extrinsics[..., :3] @ self.rotation.mT
        translation = self.scale * extrinsics[..., 3] - rotation @ self.translation
        return torch.cat([rotation, translation[..., None]], -1)

    @classmethod
    def identity(cls) -> Similarity:
        return cls(torch.ones((), dtype=torch.float64), torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def umeyama(source: Tensor, target: Tensor, weights: Tensor | None = None) -> Similarity:
    """The similarity that maps points (N, 3) to points (N, 3) with the least sum of squares, weighted by (N,), in float64.

    Source: S. Umeyama, Least-squares estimation of transformation parameters between two point patterns, PAMI 1991. If a
    reflection would fit better, the axis of least variance is flipped, so that the result is a rotation. If all source points coincide,
    only the translation is fitted. If all target points coincide, the scale is 0. Points of weight 0 may be anything.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """
    source, target = source.double(), target.double()
    share = source.new_ones(len(source)) if weights is None else weights.double()
    if not (bool((share >= 0).all()) and 0 < float(share.sum()) < math.inf):
        raise ValueError("the weights must be finite, at least 0, and not all 0")
    source, target, share = (x[share > 0] for x in (source, target, share))
    share = share / share.sum()
    mean_source, mean_target = share @ source, share @ target
    centred_source, centred_target = source - mean_source, target - mean_target
    variance = share @ centred_source.square().sum(1)
    if variance <= 1e-24 * (share @ source.square().sum(1)):  # all points coincide, up to rounding
        return Similarity(torch.ones_like(variance), torch.eye(3, dtype=source.dtype, device=source.device), mean_target - mean_source)
    u, singular, vt = torch.linalg.svd(centred_target.mT @ (share[:, None] * centred_source))
    signs = torch.ones_like(singular)
    if torch.det(u) * torch.det(vt) < 0:
        signs[2] = -1
    rotation = u @ torch.diag(signs) @ vt
    scale = (singular * signs).sum() / variance
    return Similarity(scale, rotation, mean_target - scale * rotation @ mean_source)
