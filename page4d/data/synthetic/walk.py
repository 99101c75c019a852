"""Long walks: a camera goes through four rooms in a ring and comes back to where it was. People may walk before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .camera import CameraPath, look_at, wander
from .scene import BOX, CLEARANCE, ROOM, Part, Random, Scene, assemble, clearance, solid, still, walker
from .seeds import seeded
from .texture import make_textures

FRAMES_PER_ROUND = 260.0  # of the ring
WALL = 0.06  # half of the thickness, in metres
DOOR = 0.8  # half of the width
AHEAD = (1.2, 2.6)  # metres from the camera to the people before it


def walking_scene(
    frames: int, generator: torch.Generator, moving: int, photographs: Sequence[Path] | None = None, instants: int = 1
) -> Scene:
    """A random walk of S frames. After about 300 frames the loop is closed; a longer walk goes round again, a shorter one is a part
    of it, but for furniture that would be in the way later.

    `moving` people walk before the camera, in and out of the picture. Three cover up to half of it.
    """
    random = Random(generator)
    textures = seeded("textures", random.integer(0, 2**31 - 1))
    moment = (torch.arange(frames)[:, None] + torch.arange(instants) / (2 * instants)).flatten()
    reach, height = random.uniform(2.6, 3.2), random.uniform(1.3, 1.6)  # of a room: half of its side, and of its height
    camera, angle, turn = _path(random, moment, reach, height)
    objects = [[still(ROOM, torch.tensor([2 * reach, 2 * reach, height]), torch.tensor([0.0, 0.0, height]), 0.0, len(moment))]]
    objects += _walls(reach, height, len(moment))
    background = len(objects)
    for room in range(4):
        corner = torch.tensor([1.0 if room in (0, 3) else -1.0, 1.0 if room < 2 else -1.0, 0.0]) * reach
        for _ in range(random.integer(4, 6)):
            for _ in range(20):  # until it is out of the camera's way
                where = corner + torch.tensor([random.uniform(-0.85, 0.85), random.uniform(-0.85, 0.85), 0.0]) * reach
                parts = solid(random, where, moment, False, reach)
                if clearance(parts, camera, instants) > CLEARANCE:
                    objects.append(parts)
                    break
    for _ in range(moving):
        objects.append(_companion(random, angle, turn, moment, reach))
    scene = assemble(
        random,
        objects,
        background,
        camera,
        True,
        torch.tensor([2 * reach, 2 * reach, height]),
        make_textures(len(objects), textures, photographs),
    )
    return replace(scene, light=torch.tensor([random.uniform(-1, 1), random.uniform(-1, 1), 4 * height]))  # above: the walls shade little


def _walls(reach: float, height: float, count: int) -> list[list[Part]]:
    """A cross of walls with a door in each arm."""
    walls = []
    for low, high in ((-2 * reach, -reach - DOOR), (-reach + DOOR, reach - DOOR), (reach + DOOR, 2 * reach)):
        middle, half = (low + high) / 2, (high - low) / 2
        for along in ((0, 1), (1, 0)):
            where, size = torch.zeros(3), torch.full((3,), WALL)
            where[along[1]], size[along[1]] = middle, half
            where[2] = size[2] = height
            walls.append([still(BOX, size, where, 0.0, count)])
    return walls


def _path(random: Random, moment: Tensor, reach: float, height: float) -> tuple[CameraPath, Tensor, float]:
    """The cameras, their angles (S,) about the middle of the ring, and its direction, 1 or -1."""
    time = moment / FRAMES_PER_ROUND
    start, turn = random.uniform(0, 2 * math.pi), 1.0 if random.chance(0.5) else -1.0
    angle = start + turn * 2 * math.pi * time
    centers = _ring(angle, reach) + wander(random.generator, time, 3, 3.0) * torch.tensor([0.15, 0.15, 0.08])
    centers[:, 2] += random.uniform(1.2, 1.6)
    heading = angle + turn * math.pi / 2 + 0.5 * wander(random.generator, time, 1, 2.0)[:, 0]
    ahead = torch.stack([heading.cos(), heading.sin(), -0.12 + 0.06 * wander(random.generator, time, 1, 2.0)[:, 0]], -1)
    roll = 0.03 * wander(random.generator, time, 1, 4.0)[:, 0]
    fov = torch.full_like(time, math.radians(random.uniform(60, 85)))
    return CameraPath(centers, look_at(centers, centers + ahead, roll), fov, "walk"), angle, turn


def _ring(angle: Tensor, reach: float) -> Tensor:
    """(S, 3) on the floor: through the doors, whose distance from the middle is `reach`, and wider within the rooms."""
    radius = reach * (1 + 0.12 * (1 - (4 * angle).cos()))
    return torch.stack([radius * angle.cos(), radius * angle.sin(), torch.zeros_like(angle)], -1)


def _companion(random: Random, angle: Tensor, turn: float, moment: Tensor, reach: float) -> list[Part]:
    """Somebody who walks before the camera."""
    time = moment / FRAMES_PER_ROUND
    apart = random.uniform(*AHEAD) + 0.6 * wander(random.generator, time, 1, 4.0)[:, 0]
    theirs = angle + turn * apart.clamp(min=0.9) / reach
    path = _ring(theirs, reach)
    aside = 0.5 * wander(random.generator, time, 1, 5.0)
    path[:, :2] *= 1 + aside / reach
    return walker(random, path, theirs + turn * math.pi / 2, 8 * time)
