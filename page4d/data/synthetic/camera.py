"""Camera paths: hand-held, orbit, dolly and static, with random focal lengths and occasional zooms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PATHS = ("hand-held", "orbit", "dolly", "static")


@dataclass(frozen=True)
class CameraPath:
    """S cameras in a world whose z axis points up. `fov` is the larger of the vertical and the horizontal field of view."""

    centers: Tensor  # (S, 3)
    rotation: Tensor  # (S, 3, 3), camera from world
    fov: Tensor  # (S,), radians
    kind: str

    @property
    def extrinsics(self) -> Tensor:
        """(S, 3, 4), camera from world."""
        translation = -torch.einsum("sij,sj->si", self.rotation, self.centers)
        return torch.cat([self.rotation, translation[..., None]], -1)

    def intrinsics(self, size: tuple[int, int]) -> Tensor:
        """(S, 3, 3) in pixels of an H x W image: square pixels, principal point (W / 2, H / 2) as in `page4d.geometry`."""
        height, width = size
        focal = max(height, width) / 2 / torch.tan(self.fov / 2)
        k = torch.zeros(len(focal), 3, 3, device=focal.device)
        k[:, 0, 0], k[:, 1, 1], k[:, 0, 2], k[:, 1, 2], k[:, 2, 2] = focal, focal, width / 2, height / 2, 1
        return k

    def frames(self, which: slice) -> CameraPath:
        """The path at some of its frames."""
        return CameraPath(self.centers[which], self.rotation[which], self.fov[which], self.kind)

    def to(self, device: torch.device | str) -> CameraPath:
        return CameraPath(self.centers.to(device), self.rotation.to(device), self.fov.to(device), self.kind)


def look_at(centers: Tensor, targets: Tensor, roll: Tensor) -> Tensor:
    """Camera-from-world rotations (S, 3, 3) from centers and targets (S, 3): z to the target, x right, y down, then `roll` (S,) about z."""
    forward = torch.nn.functional.normalize(targets - centers, dim=-1)
    up = torch.tensor([0.0, 0.0, 1.0], device=centers.device).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    c, s = roll.cos()[:, None], roll.sin()[:, None]
    return torch.stack([c * right + s * down, c * down - s * right, forward], 1)


def wander(generator: torch.Generator, time: Tensor, channels: int, speed: float) -> Tensor:
    """Smooth random functions of time (S, channels) of magnitude about 1. Each is a sum of three sines."""
    rate = speed * (0.3 + torch.rand(1, channels, 3, generator=generator))
    phase = 2 * math.pi * torch.rand(1, channels, 3, generator=generator)
    return (2 * math.pi * rate * time[:, None, None] + phase).sin().mul(torch.tensor([1.0, 0.5, 0.25])).sum(-1) / 1.2


def random_path(generator: torch.Generator, time: Tensor, *, radius: float, ceiling: float) -> CameraPath:
    """A random path about the centre of the scene: x and y within 1.2 `radius`, z below 0.9 `ceiling`; time (S,) goes from 0 to 1."""
    frames = len(time)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    kind = PATHS[int(torch.multinomial(torch.tensor([0.4, 0.3, 0.25, 0.05]), 1, generator=generator))]
    angle, distance, height = uniform(0, 2 * math.pi), radius * uniform(0.75, 1.0), uniform(0.5, 0.75 * ceiling)
    sweep = uniform(0.25, 1.0) * (1 if uniform(0, 1) < 0.5 else -1)
    around = angle + (sweep * time if kind == "orbit" else torch.zeros(frames))
    away = distance - (uniform(0.15, 0.45) * distance * time if kind == "dolly" else torch.zeros(frames))
    centers = torch.stack([away * around.cos(), away * around.sin(), torch.full((frames,), height)], -1)
    if kind == "dolly":
        side = torch.tensor([-math.sin(angle), math.cos(angle), 0.0])
        centers = centers + time[:, None] * side * uniform(-0.8, 0.8)
    target = torch.tensor([uniform(-0.6, 0.6), uniform(-0.6, 0.6), uniform(0.3, 1.0)]).expand(frames, 3)
    roll = torch.zeros(frames)
    if kind == "hand-held":
        centers = centers + wander(generator, time, 3, 1.0) * torch.tensor([0.45, 0.45, 0.2])
        target = target + wander(generator, time, 3, 1.0) * 0.35
        roll = 0.05 * wander(generator, time, 1, 1.0)[:, 0]
    elif kind != "static":
        target = target + wander(generator, time, 3, 0.5) * 0.1
    limits = torch.tensor([radius * 1.2, radius * 1.2, 0.9 * ceiling])
    centers = torch.minimum(torch.maximum(centers, torch.tensor([-1.2 * radius, -1.2 * radius, 0.3])), limits)
    fov = torch.full((frames,), math.radians(uniform(45, 85)))
    if uniform(0, 1) < 0.15:  # a zoom
        fov = fov * (1 + uniform(-0.25, 0.25) * time)
    return CameraPath(centers, look_at(centers, target, roll), fov, kind)
