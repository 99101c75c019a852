"""A ray caster for unit shapes in PyTorch, for all pixels and shapes of a frame at once.

The ray of a pixel has length 1 along the camera's z axis, so the ray parameter of a hit is its depth. In all shapes P is the number of
rays, K the number of shapes and S the number of frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sample import Sample
from .scene import BOX, CYLINDER, ROOM, SHEET, SPHERE, Scene
from .texture import SIZE

NEAR = 1e-3
SHADOW_START, SHADOW_END = 1e-6, 1 - 2e-3  # shapes cast shadows within this range of the way to the light
LIFT = 1e-3  # start of shadow rays above the surface, so that it does not shadow itself


@dataclass(frozen=True)
class Hits:
    """First hits of P rays. If a ray hits nothing, its depth is inf and the other values are arbitrary."""

    depth: Tensor  # (P,)
    index: Tensor  # (P,) int64: the shape
    local: Tensor  # (P, 3): position in the shape's coordinates


def _slab(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit (K, P) of the slab -1 <= x <= 1; origin (K, 1), direction (K, P). A parallel ray misses or is always inside."""
    inverse = 1 / torch.where(direction.abs() < 1e-12, 1e-12, direction)
    a, b = (-1 - origin) * inverse, (1 - origin) * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def _round(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit (K, P) of the unit ball in the given coordinates; origin (K, n, 1), direction (K, n, P). inf, -inf if it misses."""
    a = direction.square().sum(1).clamp_min(1e-12)
    b = (origin * direction).sum(1) / a
    c = (origin.square().sum(1) - 1) / a
    half = (b * b - c).sqrt()  # NaN if it misses
    return torch.nan_to_num(-b - half, nan=torch.inf), torch.nan_to_num(-b + half, nan=-torch.inf)


def _intervals(shape: int, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit (K, P) of rays with origin o (K, 3, 1) and direction d (K, 3, P) for K shapes of one kind."""
    if shape in (BOX, ROOM):
        x, y, z = (_slab(o[:, i], d[:, i]) for i in range(3))
        return torch.maximum(torch.maximum(x[0], y[0]), z[0]), torch.minimum(torch.minimum(x[1], y[1]), z[1])
    if shape == SPHERE:
        return _round(o, d)
    if shape == CYLINDER:
        side, caps = _round(o[:, :2], d[:, :2]), _slab(o[:, 2], d[:, 2])
        return torch.maximum(side[0], caps[0]), torch.minimum(side[1], caps[1])
    t = -o[:, 2] / torch.where(d[:, 2].abs() < 1e-12, 1e-12, d[:, 2])
    inside = ((o[:, :2] + t[:, None] * d[:, :2]).abs() <= 1).all(1)
    return t, torch.where(inside, t, -torch.inf)


def _distances(scene: Scene, o: Tensor, d: Tensor, least: float) -> Tensor:
    """Ray parameters (K, P) > `least` of the hits, inf without a hit; o (K, 3, 1) and d (K, 3, P) are in the coordinates of the shapes."""
    found = []
    shapes, counts = scene.shape.unique_consecutive(return_counts=True)
    for shape, first, count in zip(shapes.tolist(), (counts.cumsum(0) - counts).tolist(), counts.tolist(), strict=True):
        part = slice(first, first + count)
        entry, leave = _intervals(shape, o[part], d[part])
        t = leave if shape == ROOM else entry
        found.append(torch.where((leave >= entry) & (t > least), t, torch.inf))
    return torch.cat(found)


def trace(scene: Scene, frame: int, origin: Tensor, direction: Tensor) -> Hits:
    """The first hits of rays from `origin` (3,) along `direction` (P, 3), both in the world."""
    inverse = scene.inverse[frame]
    o = (inverse @ (origin - scene.offset[frame])[..., None])[..., 0]  # (K, 3)
    d = inverse @ direction.T  # (K, 3, P)
    depth, index = _distances(scene, o[..., None], d, NEAR).min(0)
    finite = torch.where(depth.isinf(), 0.0, depth)
    local = o[index] + finite[:, None] * torch.einsum("pij,pj->pi", inverse[index], direction)
    return Hits(depth, index, local)


def _normals(scene: Scene, frame: int, hits: Hits, direction: Tensor) -> Tensor:
    """Unit normals (P, 3) in the world, on the side of the ray's origin."""
    u, shape = hits.local, scene.shape[hits.index]
    axis = torch.nn.functional.one_hot(u.abs().argmax(-1), 3).to(u.dtype)
    cap = (u[:, 2].abs() > 1 - 1e-4)[:, None]
    up = torch.tensor([0.0, 0.0, 1.0], device=u.device)
    side = torch.where(cap, up, u * (1 - up))
    local = torch.where((shape == SPHERE)[:, None], u, torch.where((shape == CYLINDER)[:, None], side, axis * u.sign()))
    local = torch.where((shape == SHEET)[:, None], up, local)
    normal = torch.nn.functional.normalize(torch.einsum("pji,pj->pi", scene.inverse[frame, hits.index], local), dim=-1)
    return torch.where((normal * direction).sum(-1, keepdim=True) > 0, -normal, normal)


def _surface_coordinates(scene: Scene, hits: Hits) -> tuple[Tensor, Tensor]:
    """Two coordinates (P,) on the surface, in metres on the undeformed shape."""
    shape = scene.shape[hits.index]
    x, y, z = (hits.local * scene.extent[hits.index]).unbind(-1)
    largest = hits.local.abs().argmax(-1)
    flat_u, flat_v = torch.where(largest == 0, y, x), torch.where(largest == 2, y, z)
    radius = scene.extent[hits.index, 0]
    round_u = torch.atan2(hits.local[:, 1], hits.local[:, 0]) * radius
    caps = hits.local[:, 2].abs() > 1 - 1e-4
    rounded = (shape == SPHERE) | ((shape == CYLINDER) & ~caps)
    sheet = (shape == SHEET) | ((shape == CYLINDER) & caps)
    u = torch.where(rounded, round_u, torch.where(sheet, x, flat_u))
    v = torch.where(rounded, z, torch.where(sheet, y, flat_v))
    return u, v


def _shadow(scene: Scene, frame: int, points: Tensor, normals: Tensor) -> Tensor:
    """(P,): 1 if the light reaches the point, 0 if a shape is in between."""
    inverse = scene.inverse[frame]
    start = points + LIFT * normals
    o = inverse @ (start[None] - scene.offset[frame, :, None]).transpose(1, 2)  # (K, 3, P)
    d = inverse @ (scene.light - start).T
    blocks = _distances(scene, o, d, SHADOW_START) < SHADOW_END
    blocks &= ((scene.shape != ROOM) & (scene.shape != SHEET))[:, None]  # walls are behind the light, and the ground casts no shadow
    return 1 - blocks.any(0).to(points.dtype)


def _shade(scene: Scene, frame: int, hits: Hits, origin: Tensor, direction: Tensor, focal: Tensor) -> Tensor:
    """Colours (P, 3) in [0, 1]."""
    hit = hits.depth.isfinite()
    depth = torch.where(hit, hits.depth, 1.0)
    points = origin + depth[:, None] * direction
    normals = _normals(scene, frame, hits, direction)
    u, v = _surface_coordinates(scene, hits)
    tile = scene.tile[hits.index]
    length = direction.norm(dim=-1)
    slant = ((normals * direction).sum(-1).abs() / length).clamp_min(0.15)
    texels = depth * length / focal / slant / tile * SIZE  # texels covered by a pixel along its longer side
    colour = scene.textures(scene.texture[hits.index], u / tile, v / tile, texels.clamp_min(1).log2())
    towards = torch.nn.functional.normalize(scene.light - points, dim=-1)
    lit = (normals * towards).sum(-1).clamp_min(0) * _shadow(scene, frame, points, normals)
    colour = colour * (scene.ambient + (1.15 - scene.ambient) * lit)[:, None]
    if scene.sky is not None:
        height = (direction[:, 2] / length).clamp(0, 1)[:, None]
        colour = torch.where(hit[:, None], colour, scene.sky[0] + height.sqrt() * (scene.sky[1] - scene.sky[0]))
    return colour.clamp(0, 1)


def _pixels(size: tuple[int, int], device: torch.device, supersample: int = 1) -> Tensor:
    """Pixel coordinates (P, 2), x and y, row-major, with centres at integers. Each pixel has supersample^2 of them."""
    sub = (torch.arange(supersample, device=device) + 0.5) / supersample - 0.5
    y, x = ((torch.arange(n, device=device)[:, None] + sub).flatten() for n in size)
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1].flatten(), grid[0].flatten()], -1)


def _rays(scene: Scene, frame: int, pixels: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Camera centre (3,) and ray directions (P, 3) in the world, with length 1 along the camera's z axis."""
    centre, focal = intrinsics[:2, 2], intrinsics[[0, 1], [0, 1]]
    in_camera = torch.cat([(pixels - centre) / focal, torch.ones_like(pixels[:, :1])], -1)
    return scene.camera.centers[frame], in_camera @ scene.camera.rotation[frame]


def _project(scene: Scene, frame: int, points: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (P, 2) and depth (P,) of world points at a frame."""
    in_camera = (points - scene.camera.centers[frame]) @ scene.camera.rotation[frame].T
    depth = in_camera[:, 2]
    ahead = torch.where(depth.abs() < NEAR, NEAR, depth)
    return in_camera[:, :2] / ahead[:, None] * intrinsics[[0, 1], [0, 1]] + intrinsics[:2, 2], depth


def render(
    scene: Scene, size: tuple[int, int], *, tracks: int = 0, supersample: int = 1, generator: torch.Generator | None = None
) -> Sample:
    """Render the images and ground truth of every frame.

    Args:
        size: (H, W) in pixels.
        tracks: number of points tracked from frame 0. If something that moves is visible, half of them are on it.
        supersample: rays along each side of a pixel. Ground truth is that of the pixel's centre.
        generator: draws the tracked points.

    Returns:
        A Sample on the scene's device. The visibility of a track is exact: it comes from a ray to the point, not from the depth map.
    """
    device = scene.linear.device
    intrinsics = scene.camera.intrinsics(size)
    frames, centres = len(intrinsics), _pixels(size, device)
    images, hits = [], []
    for s in range(frames):
        origin, direction = _rays(scene, s, centres, intrinsics[s])
        hits.append(trace(scene, s, origin, direction))
        if supersample == 1:
            colour = _shade(scene, s, hits[-1], origin, direction, intrinsics[s, 0, 0])
        else:
            origin, direction = _rays(scene, s, _pixels(size, device, supersample), intrinsics[s])
            colour = _shade(scene, s, trace(scene, s, origin, direction), origin, direction, supersample * intrinsics[s, 0, 0])
        image = colour.T.unflatten(1, (size[0] * supersample, size[1] * supersample))
        images.append(torch.nn.functional.avg_pool2d(image, supersample))
    depth = torch.stack([h.depth for h in hits])
    index, local = torch.stack([h.index for h in hits]), torch.stack([h.local for h in hits])
    valid = depth < scene.far
    points = torch.stack([scene.at(local[s], index[s], s) for s in range(frames)])
    flow = []
    for s in range(frames - 1):
        pixels, ahead = _project(scene, s + 1, scene.at(local[s], index[s], s + 1), intrinsics[s + 1])
        flow.append(torch.where((valid[s] & (ahead > NEAR))[:, None], pixels - centres, 0.0))
    found: dict[str, Any] = {}
    if tracks:
        keys = ("tracks", "track_points", "track_visible")
        found = dict(zip(keys, _follow(scene, size, intrinsics, hits[0], valid[0], tracks, generator), strict=True))
    return Sample(
        images=torch.stack(images),
        extrinsics=scene.camera.extrinsics,
        intrinsics=intrinsics,
        depth=torch.where(valid, depth, 0.0).unflatten(1, size),
        world_points=torch.where(valid[..., None], points, 0.0).unflatten(1, size),
        valid=valid.unflatten(1, size),
        dynamic=(scene.moves[index] & valid).unflatten(1, size),
        object_id=torch.where(valid, scene.object_id[index], 0).unflatten(1, size),
        flow=torch.stack(flow).unflatten(1, size) if flow else None,
        **found,
    )


def _follow(
    scene: Scene, size: tuple[int, int], intrinsics: Tensor, hits: Hits, valid: Tensor, count: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (S, N, 2), world points (S, N, 3) and visibility (S, N) of `count` points chosen in frame 0."""
    device = valid.device
    weight = valid.float().cpu()
    moving = (scene.moves[hits.index] & valid).cpu()
    if 0 < moving.sum() < valid.sum():
        weight[moving] *= float(valid.sum() - moving.sum()) / float(moving.sum())
    chosen = torch.multinomial(weight + 1e-12, count, replacement=count > int(valid.sum()), generator=generator).to(device)
    local, index = hits.local[chosen], hits.index[chosen]
    tracks, points, visible = [], [], []
    for s in range(len(intrinsics)):
        world = scene.at(local, index, s)
        pixels, depth = _project(scene, s, world, intrinsics[s])
        origin, direction = _rays(scene, s, pixels, intrinsics[s])
        inside = ((pixels >= -0.5) & (pixels < torch.tensor([size[1], size[0]], device=device) - 0.5)).all(-1)
        first = trace(scene, s, origin, direction).depth
        tracks.append(pixels)
        points.append(world)
        visible.append(inside & (depth > NEAR) & (first > depth * (1 - 1e-3)))
    return torch.stack(tracks), torch.stack(points), torch.stack(visible)
