"""The shapes of a scene and their motion.

Every shape is a unit shape under an affine map that may change with time. A point u of the shape is at A(s) u + c(s) in the world at frame
s. A surface point keeps its u through any motion, stretching included, so tracks are exact. The world's z axis points up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...errors import InputError
from .camera import CameraPath, random_path
from .seeds import seeded
from .texture import Textures, make_textures

# box: |x|, |y|, |z| <= 1. sphere: |u| <= 1. cylinder: x^2 + y^2 <= 1, |z| <= 1. sheet: z = 0, |x|, |y| <= 1. room: a box seen from inside.
BOX, SPHERE, CYLINDER, SHEET, ROOM = range(5)
CLEARANCE = 0.6  # metres around the camera without objects
WALK = "walk"  # see walk.py
KINDS = ("static", "dynamic", "mixed", WALK)


@dataclass(frozen=True)
class Scene:
    """K shapes over S frames. Lengths are metres."""

    shape: Tensor  # (K,) int64, ascending, so that equal shapes are contiguous
    linear: Tensor  # (S, K, 3, 3): A
    offset: Tensor  # (S, K, 3): c
    extent: Tensor  # (K, 3): half sizes in metres, for textures, which do not stretch with the shape
    object_id: Tensor  # (K,) int64, 0 = background
    moves: Tensor  # (K,) bool
    texture: Tensor  # (K,) int64
    tile: Tensor  # (K,): side of a texture in metres
    textures: Textures
    camera: CameraPath
    light: Tensor  # (3,): position in the world
    ambient: float  # fraction of the light that is ambient
    sky: Tensor | None = None  # (2, 3): colours at the horizon and above, for an outdoor scene
    far: float = 25.0  # surfaces beyond this depth have no ground truth

    @cached_property
    def inverse(self) -> Tensor:
        """(S, K, 3, 3): the inverse of `linear`, from the world to the shapes."""
        return torch.linalg.inv(self.linear)

    def at(self, u: Tensor, index: Tensor, frame: int) -> Tensor:
        """World points (P, 3) at `frame` of the points u (P, 3) of shapes `index` (P,)."""
        return torch.einsum("pij,pj->pi", self.linear[frame, index], u) + self.offset[frame, index]

    def frames(self, which: slice) -> Scene:
        """The same scene at some of its frames."""
        return replace(self, linear=self.linear[which], offset=self.offset[which], camera=self.camera.frames(which))

    def to(self, device: torch.device | str) -> Scene:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if hasattr(value, "to")})


class Random:
    """Random draws from one generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        return self.uniform(0, 1) < probability


@dataclass(frozen=True)
class Part:
    """One shape of an object, with its map at every frame."""

    shape: int
    linear: Tensor  # (S, 3, 3)
    offset: Tensor  # (S, 3)
    extent: Tensor  # (3,)
    moves: bool


def _about_z(angle: Tensor) -> Tensor:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, -s, zero, s, c, zero, zero, zero, one], -1).unflatten(-1, (3, 3))


def _about_y(angle: Tensor) -> Tensor:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c], -1).unflatten(-1, (3, 3))


def still(shape: int, half: Tensor, position: Tensor, angle: float, frames: int) -> Part:
    linear = _about_z(torch.tensor(angle)) * half
    return Part(shape, linear.expand(frames, 3, 3), position.expand(frames, 3), half, False)


def _ground_path(random: Random, start: Tensor, time: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Positions (S, 3) and headings (S,) of an object that moves over the floor and stays within `radius` of the centre."""
    heading, turn, length = random.uniform(0, 2 * math.pi), random.uniform(-1.5, 1.5), random.uniform(0.8, 2.5)
    half = turn * time / 2  # the path is a circular arc, computed from its chord
    chord = length * time * torch.sinc(half / math.pi)
    path = start + torch.stack([chord * (heading + half).cos(), chord * (heading + half).sin(), torch.zeros_like(time)], -1)
    distance = path[:, :2].norm(dim=-1, keepdim=True).clamp_min(1e-6)
    path[:, :2] *= (radius / distance).clamp_max(1)
    return path, heading + turn * time


def solid(random: Random, position: Tensor, time: Tensor, moving: bool, radius: float) -> list[Part]:
    """A box, ball, cylinder or stretching blob. It stands on the floor, or it moves over the floor, spins and bounces."""
    shape = (BOX, SPHERE, CYLINDER)[random.integer(0, 2)]
    half = torch.tensor([random.uniform(0.15, 0.6) for _ in range(3)])
    if shape != BOX:
        half[1] = half[0]
    if shape == SPHERE and random.chance(0.5):
        half[2] = half[0]
    angle = random.uniform(0, 2 * math.pi)
    if not moving:
        return [still(shape, half, position + half * torch.tensor([0.0, 0.0, 1.0]), angle, len(time))]
    path, _ = _ground_path(random, position, time, radius)
    if random.chance(0.4):  # bounces or floats
        path[:, 2] += random.uniform(0.2, 1.0) * (math.pi * (random.uniform(0.5, 2) * time + random.uniform(0, 1))).sin().abs()
    spin = random.uniform(-2, 2) if random.chance(0.6) else 0.0
    stretch = torch.ones_like(time)
    if random.chance(0.3):
        stretch = 1 + random.uniform(0.15, 0.4) * (2 * math.pi * (random.uniform(0.5, 1.5) * time + random.uniform(0, 1))).sin()
    path[:, 2] += half[2] * stretch
    scale = torch.stack([stretch.rsqrt(), stretch.rsqrt(), stretch], -1) * half  # keeps the volume
    return [Part(shape, _about_z(angle + spin * time) * scale[:, None, :], path, half, True)]


def walker(random: Random, path: Tensor, heading: Tensor, time: Tensor) -> list[Part]:
    """A walker with torso, head, arms and legs, on a path (S, 3) over the floor. The limbs swing about hip and shoulder.

    `time` (S,): a unit has one to two and a half steps.
    """
    height = random.uniform(1.2, 1.9)
    swing = random.uniform(0.3, 0.7) * (2 * math.pi * (random.uniform(1, 2.5) * time + random.uniform(0, 1))).sin()
    body = _about_z(heading)
    upright = torch.zeros_like(time)
    parts = [  # shape, half sizes, joint, vector from joint to middle, angle about the joint; in units of the height
        (SPHERE, (0.10, 0.14, 0.22), (0, 0, 0.65), (0, 0, 0), upright),
        (SPHERE, (0.07, 0.07, 0.09), (0, 0, 0.92), (0, 0, 0), upright),
        (CYLINDER, (0.045, 0.045, 0.24), (0, 0.07, 0.48), (0, 0, -0.24), swing),
        (CYLINDER, (0.045, 0.045, 0.24), (0, -0.07, 0.48), (0, 0, -0.24), -swing),
        (CYLINDER, (0.035, 0.035, 0.18), (0, 0.17, 0.80), (0, 0, -0.18), -swing),
        (CYLINDER, (0.035, 0.035, 0.18), (0, -0.17, 0.80), (0, 0, -0.18), swing),
    ]
    found = []
    for shape, half, joint, arm, angle in parts:
        extent, local = height * torch.tensor(half), _about_y(angle)
        middle = height * (
            torch.tensor(joint, dtype=torch.float32) + torch.einsum("sij,j->si", local, torch.tensor(arm, dtype=torch.float32))
        )
        found.append(Part(shape, body @ local * extent, path + torch.einsum("sij,sj->si", body, middle), extent, True))
    return found


def random_scene(
    kind: str,
    frames: int,
    generator: torch.Generator,
    photographs: Sequence[Path] | None = None,
    moving: int | None = None,
    instants: int = 1,
) -> Scene:
    """A random scene of a kind: "static" (only the camera moves), "dynamic" (one to four objects move as well) or "mixed" (either).

    `moving` sets the number of independently moving objects instead. The scene has `instants` moments per frame: the first is the time of
    the frame, the others are within half of the time to the next frame.
    """
    if kind == WALK:
        raise InputError("a walk is made by walking_scene, or SyntheticScenes")
    random = Random(generator)
    textures = seeded("textures", random.integer(0, 2**31 - 1))  # a separate generator, so that photographs change nothing else
    time = (torch.arange(frames)[:, None] + torch.arange(instants) / (2 * instants)).flatten() / max(frames - 1, 1)
    if moving is None:
        dynamic = kind == "dynamic" or (kind == "mixed" and random.chance(0.5))
        moving = random.integer(1, 4) if dynamic else 0
    indoors = random.chance(0.6)
    size = torch.tensor([random.uniform(3.5, 5.5), random.uniform(3.5, 5.5), random.uniform(1.4, 2.0)])
    camera = random_path(random.generator, time, radius=0.75 * float(size[:2].min()), ceiling=2 * float(size[2]))
    reach = 0.45 * float(size[:2].min())
    objects: list[list[Part]] = []

    def place(draw: Callable[..., list[Part]], *args: bool) -> None:
        """Draw an object again if the camera would run into it, at most 20 times."""
        for _ in range(20):
            parts = draw(*args)
            if clearance(parts, camera, instants) > CLEARANCE:
                objects.append(parts)
                break

    def house() -> list[Part]:
        angle, distance = random.uniform(0, 2 * math.pi), random.uniform(7, 14)
        half = torch.tensor([random.uniform(0.5, 3), random.uniform(0.5, 3), random.uniform(0.8, 3)])
        where = torch.tensor([distance * math.cos(angle), distance * math.sin(angle), float(half[2])])
        return [still(BOX, half, where, random.uniform(0, 3), len(time))]

    def thing(moves: bool) -> list[Part]:
        walks = moves and random.chance(0.4)
        angle, distance = random.uniform(0, 2 * math.pi), reach * math.sqrt(random.uniform(0, 1))
        where = torch.tensor([distance * math.cos(angle), distance * math.sin(angle), 0.0])
        return walker(random, *_ground_path(random, where, time, reach), time) if walks else solid(random, where, time, moves, reach)

    if indoors:  # the floor is z = 0
        objects.append([still(ROOM, size, torch.tensor([0.0, 0.0, float(size[2])]), 0.0, len(time))])
    else:
        objects.append([still(SHEET, torch.tensor([60.0, 60.0, 1.0]), torch.zeros(3), random.uniform(0, 2), len(time))])
        for _ in range(random.integer(1, 4)):  # houses and walls around the scene
            place(house)
    background = len(objects)
    for i in range(random.integer(3, 7) + moving):
        place(thing, i < moving)
    return assemble(random, objects, background, camera, indoors, size, make_textures(len(objects), textures, photographs))


def clearance(parts: list[Part], camera: CameraPath, instants: int) -> float:
    """Smallest distance over all frames between the camera and the boxes around the parts."""
    nearest = math.inf
    for part in parts:
        half = part.linear.norm(dim=-2)  # the axes are perpendicular
        away = torch.einsum("sji,sj->si", part.linear / half[:, None, :], camera.centers - part.offset)
        gap = (away.abs() - half).clamp_min(0).norm(dim=-1)
        nearest = min(nearest, float(gap[::instants].min()))
    return nearest


def assemble(
    random: Random, objects: list[list[Part]], background: int, camera: CameraPath, indoors: bool, size: Tensor, textures: Textures
) -> Scene:
    numbered = [(part, i) for i, parts in enumerate(objects) for part in parts]
    numbered.sort(key=lambda pair: pair[0].shape)
    parts = [part for part, _ in numbered]
    which = torch.tensor([i for _, i in numbered])
    tile = torch.tensor([random.uniform(1.5, 4.0) if i < background else random.uniform(0.4, 1.5) for i in range(len(objects))])
    angle = random.uniform(0, 2 * math.pi)
    if indoors:
        light = torch.tensor([random.uniform(-0.6, 0.6), random.uniform(-0.6, 0.6), 1.85]) * size
    else:
        light = 100 * torch.tensor([math.cos(angle), math.sin(angle), random.uniform(0.5, 2.0)])
    blue = torch.tensor([[0.85, 0.88, 0.92], [0.35, 0.55, 0.85]]) * random.uniform(0.7, 1.05)
    return Scene(
        shape=torch.tensor([part.shape for part in parts]),
        linear=torch.stack([part.linear for part in parts], 1).contiguous(),
        offset=torch.stack([part.offset for part in parts], 1).contiguous(),
        extent=torch.stack([part.extent for part in parts]),
        object_id=(which - background + 1).clamp_min(0),
        moves=torch.tensor([part.moves for part in parts]),
        texture=which,
        tile=tile[which],
        textures=textures,
        camera=camera,
        light=light,
        ambient=random.uniform(0.35, 0.6),
        sky=None if indoors else blue.clamp(0, 1),
    )
