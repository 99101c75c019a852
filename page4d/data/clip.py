"""A small ray caster that draws the bundled clip, with exact ground truth: a room with things in it, two of which move.

`python -m page4d.data.clip OUT.mp4` writes the video. Units are metres; the axes are OpenCV's (x right, y down, z forward).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Array = NDArray[np.float64]
Texture = Callable[[Array, Array], Array]  # points and normals (N, 3) in the object's frame -> linear RGB (N, 3)

FPS = 12
ROOM_LOW, ROOM_HIGH = np.array([-2.6, -1.5, -1.2]), np.array([2.6, 1.2, 4.6])  # y = 1.2 is the floor
LIGHT = np.array([-0.9, -1.35, 1.3])
LIGHT_RADIUS = 0.22
AMBIENT = np.array([0.20, 0.22, 0.26])


@dataclass(frozen=True)
class RenderedClip:
    """S frames of H x W pixels. Pixel centres are integers, as in `page4d.geometry.unproject`; the world is the first camera."""

    images: NDArray[np.uint8]  # (S, H, W, 3)
    depth: NDArray[np.float32]  # (S, H, W), along the camera's z, in metres
    extrinsics: Array  # (S, 3, 4), camera-from-world
    intrinsics: Array  # (S, 3, 3)
    dynamic: NDArray[np.bool_]  # (S, H, W): the pixel shows an object that moves in the world


@dataclass(frozen=True)
class Body:
    """A solid at a place: x_local = R^T (x - centre)."""

    center: Array
    rotation: Array  # (3, 3)
    texture: Texture
    dynamic: bool = False

    def intersect(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        """Distances (N,) in units of `direction` (inf: no hit) and local normals (N, 3), of local rays."""
        raise NotImplementedError

    def to_local(self, points: Array) -> Array:
        return (points - self.center) @ self.rotation


@dataclass(frozen=True)
class Sphere(Body):
    radius: float = 1.0

    def intersect(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        a, b = (direction**2).sum(-1), (origin * direction).sum(-1)
        disc = b * b - a * ((origin**2).sum(-1) - self.radius**2)
        t = (-b - np.sqrt(np.maximum(disc, 0))) / a
        t = np.where((disc > 0) & (t > 1e-4), t, np.inf)
        return t, (origin + np.where(np.isfinite(t), t, 0)[:, None] * direction) / self.radius


@dataclass(frozen=True)
class Box(Body):
    """An axis-aligned box in its own frame; `inside_out` is a room seen from within."""

    half: tuple[float, float, float] = (1.0, 1.0, 1.0)
    inside_out: bool = False

    def intersect(self, origin: Array, direction: Array) -> tuple[Array, Array]:
        safe = np.where(np.abs(direction) < 1e-9, 1e-9, direction)
        first, second = (-np.array(self.half) - origin) / safe, (np.array(self.half) - origin) / safe
        near, far = np.minimum(first, second), np.maximum(first, second)
        enter, leave = near.max(-1), far.min(-1)
        t, axis = (leave, far.argmin(-1)) if self.inside_out else (enter, near.argmax(-1))
        normal = np.zeros_like(direction)
        rows = np.arange(len(t))
        normal[rows, axis] = -np.sign(direction[rows, axis])
        return np.where((enter < leave) & (t > 1e-4), t, np.inf), normal


def render_clip(
    frames: int = 28, height: int = 252, width: int = 336, *, supersample: int = 3, seed: int = 0, progress: bool = False
) -> RenderedClip:
    """Draw the clip. The motion always takes `frames` frames from start to end; `seed` changes the textures' details.

    Colours average supersample^2 rays per pixel, each with its own point on the lamp; depth and mask come from the pixel's centre.
    """
    noise = ValueNoise(seed)
    focal = 0.5 * width / np.tan(np.radians(64) / 2)
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    u, v = np.meshgrid(np.arange(width, dtype=float), np.arange(height, dtype=float))
    jitter = (np.arange(supersample) + 0.5) / supersample - 0.5
    lamp = _disc(supersample**2) * LIGHT_RADIUS
    images = np.empty((frames, height, width, 3), np.uint8)
    depth = np.empty((frames, height, width), np.float32)
    dynamic = np.empty((frames, height, width), bool)
    poses = []
    for i in tqdm(range(frames), desc="rendering", unit="frame", disable=None if progress else True):
        time = i / max(1, frames - 1)
        bodies = _scene(time, noise)
        center, rotation = _camera(time)  # rotation: world-from-camera
        poses.append(np.column_stack([rotation.T, -rotation.T @ center]))

        def rays(du: float, dv: float, rotation: Array = rotation) -> Array:
            local = np.stack([(u + du - width / 2) / focal, (v + dv - height / 2) / focal, np.ones_like(u)], -1)
            return local.reshape(-1, 3) @ rotation.T

        total = np.zeros((height * width, 3))
        for k, (du, dv) in enumerate((a, b) for a in jitter for b in jitter):
            total += _shade(center, rays(du, dv), bodies, LIGHT + np.array([lamp[k, 0], 0, lamp[k, 1]]))
        image = _tone(total / supersample**2)
        images[i] = (image * 255 + 0.5).astype(np.uint8).reshape(height, width, 3)
        distance, hit, _ = _trace(center, rays(0, 0), bodies)  # rays have z = 1 in the camera, so distances are depths
        depth[i] = distance.reshape(height, width)
        dynamic[i] = np.array([body.dynamic for body in bodies])[hit].reshape(height, width)
    return RenderedClip(images, depth, _relative_to_first(np.stack(poses)), np.repeat(intrinsics[None], frames, 0), dynamic)


def write_clip(path: str | Path, images: NDArray[np.uint8], fps: int = FPS) -> Path:
    """Write images (S, H, W, 3) as H.264 where FFmpeg has an encoder for it, else as MPEG-4."""
    import av

    codec, options = ("libx264", {"crf": "20", "preset": "veryslow"}) if "libx264" in av.codecs_available else ("mpeg4", {"qscale": "4"})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)  # for type checkers: the codec settles it
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return Path(path)


class ValueNoise:
    """Smooth random values in [0, 1] at points in space: random numbers on the integer lattice, interpolated."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.values = rng.random(256)
        self.order = rng.permutation(256)

    def __call__(self, points: Array) -> Array:
        """(N,) of points (N, 3)."""
        cell = np.floor(points).astype(np.int64)
        weight = points - cell
        weight = weight * weight * (3 - 2 * weight)
        # One table look-up per axis, nested: a hash of the lattice point.
        (x0, y0, z0), (x1, y1, z1) = (cell & 255).T, ((cell + 1) & 255).T
        wx, wy, wz = weight.T
        result = np.zeros(len(points))
        for x, ax in ((x0, 1 - wx), (x1, wx)):
            hashed_x = self.order[x]
            for y, ay in ((y0, 1 - wy), (y1, wy)):
                hashed_xy = self.order[(hashed_x + y) & 255]
                for z, az in ((z0, 1 - wz), (z1, wz)):
                    result += ax * ay * az * self.values[(hashed_xy + z) & 255]
        return result

    def fractal(self, points: Array, octaves: int = 4) -> Array:
        """Octaves of noise, each twice as fine and half as strong, in [0, 1]."""
        layers = [0.5**k * self(points * 2**k + 17.3 * k) for k in range(octaves)]
        return np.sum(layers, axis=0) / (2 - 0.5 ** (octaves - 1))


def _shade(origin: Array, direction: Array, bodies: Sequence[Body], light: Array) -> Array:
    """Linear RGB (N, 3) of rays: texture times lamp (Lambert, fading with distance, with shadows) plus ambient light."""
    distance, hit, local_normal = _trace(origin, direction, bodies)
    points = origin + distance[:, None] * direction
    normal, albedo = np.empty_like(points), np.empty_like(points)
    for k, body in enumerate(bodies):
        of = hit == k
        normal[of] = local_normal[of] @ body.rotation.T
        albedo[of] = body.texture(body.to_local(points[of]), local_normal[of])
    to_light = light - points
    length = np.linalg.norm(to_light, axis=-1)
    lambert = np.maximum((normal * to_light).sum(-1) / length, 0)
    start = points + 1e-3 * normal
    lit = np.ones(len(points))
    for body in bodies[1:]:  # the room itself casts no shadow
        lit[body.intersect(body.to_local(start), to_light @ body.rotation)[0] < 1] = 0
    lamp = (lit * lambert * 9.5 / (1.2 + length**2))[:, None] * np.array([1.0, 0.95, 0.86])
    sky = 0.75 - 0.25 * normal[:, 1]  # y points down
    return albedo * (lamp + AMBIENT * (sky * _corner_darkening(points))[:, None])


def _trace(origin: Array, direction: Array, bodies: Sequence[Body]) -> tuple[Array, NDArray[np.int64], Array]:
    """Nearest hits: distance (N,), index of the body (N,), local normal (N, 3). The room is closed, so there always is one."""
    distance, hit, normal = np.full(len(direction), np.inf), np.zeros(len(direction), np.int64), np.zeros_like(direction)
    for k, body in enumerate(bodies):
        t, n = body.intersect(np.broadcast_to(body.to_local(origin), direction.shape), direction @ body.rotation)
        nearer = t < distance
        distance[nearer], hit[nearer], normal[nearer] = t[nearer], k, n[nearer]
    return distance, hit, normal


def _corner_darkening(points: Array) -> Array:
    """Less ambient light where walls, floor and ceiling meet: at the second nearest of them."""
    gaps = np.sort(np.minimum(points - ROOM_LOW, ROOM_HIGH - points), axis=-1)[:, 1]
    return 0.55 + 0.45 * np.clip(gaps / 0.7, 0, 1) ** 0.7


def _tone(linear: Array) -> Array:
    """Soft shoulder, then display gamma: [0, 1]."""
    return (linear * (1 + linear / 5) / (1 + linear)).clip(0, 1) ** (1 / 2.2)


def _disc(count: int) -> Array:
    """Points (count, 2) spread evenly over the unit disc (a sunflower)."""
    k = np.arange(count)
    radius, angle = np.sqrt((k + 0.5) / count), k * np.pi * (3 - np.sqrt(5))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def _camera(time: float) -> tuple[Array, Array]:
    """Centre and world-from-camera rotation: an arc to the right, held by hand, looking at the middle of the room."""
    tau = 2 * np.pi * time
    center = np.array([-0.75 + 1.5 * time, -0.10 + 0.05 * np.sin(1.7 * tau) + 0.02 * np.sin(4.1 * tau), -0.55 + 0.35 * np.sin(tau / 2)])
    target = np.array([-0.1 + 0.15 * np.sin(1.3 * tau), 0.32 + 0.04 * np.sin(2.3 * tau + 1), 2.9])
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross([0.03 * np.sin(1.9 * tau), 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    return center, np.column_stack([right, np.cross(forward, right), forward])


def _relative_to_first(poses: Array) -> Array:
    """Camera-from-world poses (S, 3, 4) with the first camera as the world."""
    rotation, translation = poses[0, :, :3], poses[0, :, 3]
    relative = poses[:, :, :3] @ rotation.T
    return np.concatenate([relative, (poses[:, :, 3] - relative @ translation)[..., None]], -1)


def _scene(time: float, noise: ValueNoise) -> list[Body]:
    """The room first, then what stands in it; the last two move."""
    floor = ROOM_HIGH[1]
    still, slide = np.eye(3), -1.75 + 1.5 * time
    bounces = 2.5 * time + 0.35
    phase = bounces - np.floor(bounces)
    ball_center = np.array([1.75 - 3.1 * time, floor - 0.24 - 3.0 * phase * (1 - phase), 2.15 + 0.3 * time])
    return [
        Box((ROOM_LOW + ROOM_HIGH) / 2, still, _room_texture(noise), half=_half((ROOM_HIGH - ROOM_LOW) / 2), inside_out=True),
        Box(np.array([-1.65, floor - 0.75, 3.9]), _turn(12), _planks(noise, (0.42, 0.24, 0.11)), half=(0.5, 0.75, 0.3)),
        Box(np.array([1.35, floor - 0.32, 3.2]), _turn(-28), _crate(noise), half=(0.42, 0.32, 0.32)),
        Box(
            np.array([1.28, floor - 0.80, 3.22]), _turn(20), _checker((0.75, 0.62, 0.16), (0.10, 0.22, 0.34), 0.09), half=(0.2, 0.16, 0.18)
        ),
        Sphere(np.array([0.05, floor - 0.42, 3.7]), _turn(40), _marble(noise), radius=0.42),
        Box(
            np.array([slide, floor - 0.2, 2.2]),
            _turn(8),
            _stripes(noise, (0.62, 0.07, 0.06), (0.85, 0.80, 0.70)),
            True,
            half=(0.24, 0.2, 0.2),
        ),
        Sphere(ball_center, _roll(-400 * time), _beach_ball(), True, radius=0.24),
    ]


def _half(sides: Array) -> tuple[float, float, float]:
    return float(sides[0]), float(sides[1]), float(sides[2])


def _turn(degrees: float) -> Array:
    """Rotation about the vertical axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _roll(degrees: float) -> Array:
    """Rotation about an axis close to the viewing direction."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return _turn(25) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _mix(low: Sequence[float], high: Sequence[float], weight: Array) -> Array:
    return np.asarray(low) + (np.asarray(high) - np.asarray(low)) * weight[:, None]


def _room_texture(noise: ValueNoise) -> Texture:
    """Tiles on the floor, wallpaper with a skirting board and a framed picture, a plain ceiling."""
    half = (ROOM_HIGH - ROOM_LOW) / 2

    def texture(points: Array, normals: Array) -> Array:
        color = np.empty_like(points)
        grain = noise.fractal(points * 5)
        on_floor, on_ceiling = normals[:, 1] < -0.5, normals[:, 1] > 0.5
        on_wall = ~(on_floor | on_ceiling)
        x, z = points[:, 0], points[:, 2]
        tile = 0.45
        odd = (np.floor(x / tile) + np.floor(z / tile)) % 2
        edge = np.minimum(np.abs((x / tile + 0.5) % 1 - 0.5), np.abs((z / tile + 0.5) % 1 - 0.5)) < 0.025
        tiles = _mix((0.50, 0.42, 0.32), (0.25, 0.19, 0.14), odd) * (0.55 + 0.9 * grain[:, None])
        color[on_floor] = np.where(edge[:, None], (0.12, 0.11, 0.10), tiles)[on_floor]
        color[on_ceiling] = (np.array([0.75, 0.74, 0.70]) * (0.85 + 0.3 * grain[:, None]))[on_ceiling]
        along = np.where(np.abs(normals[:, 0]) > 0.5, z, x)
        up = half[1] - points[:, 1]  # height over the floor
        stripe = (np.floor(along / 0.16) % 2) * 0.35 + 0.65 * noise.fractal(points * 9, 3)
        wall = _mix((0.20, 0.33, 0.36), (0.50, 0.58, 0.50), stripe)
        wall = np.where((up < 0.14)[:, None], np.array([0.45, 0.40, 0.33]) * (0.8 + 0.4 * grain[:, None]), wall)
        for where, width, hue in ((0.15, 0.62, 0.0), (-1.35, 0.34, 0.5), (1.55, 0.40, 0.25)):
            dx, dy = np.abs(along - where) / width, np.abs(up - 1.75) / 0.42
            wall = np.where(((dx < 1) & (dy < 1))[:, None], (0.10, 0.07, 0.05), wall)
            view = noise.fractal(np.stack([along * 3.1 + 40 * hue, up * 4.3, 0 * up], -1))
            paint = 0.42 + 0.26 * np.cos(2 * np.pi * (hue + 1.6 * view[:, None] + np.array([0.0, 0.18, 0.42])))
            wall = np.where(((dx < 0.9) & (dy < 0.87))[:, None], 0.7 * paint, wall)
        color[on_wall] = wall[on_wall]
        return color

    return texture


def _planks(noise: ValueNoise, brown: Sequence[float]) -> Texture:
    """Boards with wood grain."""

    def texture(points: Array, _: Array) -> Array:
        board = np.floor(points[:, 1] / 0.25)
        grain = noise.fractal(points * np.array([4.0, 38.0, 38.0]) + board[:, None] * 7.7)
        seam = np.abs((points[:, 1] / 0.25 + 0.5) % 1 - 0.5) < 0.04
        return np.asarray(brown) * ((0.5 + 1.3 * grain) * np.where(seam, 0.3, 1.0))[:, None]

    return texture


def _crate(noise: ValueNoise) -> Texture:
    """Wood with a dark frame along the edges of each face and a diagonal bar."""
    wood = _planks(noise, (0.55, 0.38, 0.18))

    def texture(points: Array, normals: Array) -> Array:
        scaled = np.abs(points) / np.array([0.42, 0.32, 0.32])
        frame = np.sort(np.where(np.abs(normals) > 0.5, 0, scaled), axis=-1)[:, 2] > 0.82
        bar = np.abs(points[:, 0] + points[:, 2] - 1.1 * points[:, 1]) < 0.07
        return wood(points, normals) * np.where(frame | bar, 0.5, 1.1)[:, None]

    return texture


def _checker(first: Sequence[float], second: Sequence[float], side: float) -> Texture:
    def texture(points: Array, _: Array) -> Array:
        odd = np.floor((points + 1e-6) / side).sum(-1) % 2
        return _mix(first, second, odd)

    return texture


def _stripes(noise: ValueNoise, first: Sequence[float], second: Sequence[float]) -> Texture:
    def texture(points: Array, _: Array) -> Array:
        diagonal = np.floor((points[:, 0] + points[:, 1] + points[:, 2]) / 0.09) % 2
        return _mix(first, second, diagonal) * (0.75 + 0.5 * noise.fractal(points * 14, 3))[:, None]

    return texture


def _marble(noise: ValueNoise) -> Texture:
    def texture(points: Array, _: Array) -> Array:
        vein = np.abs(np.sin(9 * points[:, 0] + 5 * points[:, 1] + 9 * noise.fractal(points * 4)))
        return _mix((0.05, 0.14, 0.20), (0.62, 0.70, 0.70), vein**0.7)

    return texture


def _beach_ball() -> Texture:
    """Six coloured segments with white caps."""
    palette = np.array(
        [(0.80, 0.08, 0.06), (0.85, 0.85, 0.82), (0.05, 0.22, 0.65), (0.85, 0.85, 0.82), (0.90, 0.60, 0.04), (0.85, 0.85, 0.82)]
    )

    def texture(_: Array, normals: Array) -> Array:
        segment = np.floor((np.arctan2(normals[:, 1], normals[:, 0]) / (2 * np.pi) + 0.5) * 6).astype(int) % 6
        return np.where((np.abs(normals[:, 2]) > 0.93)[:, None], (0.05, 0.22, 0.65), palette[segment])

    return texture


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m page4d.data.clip OUT.mp4")
    write_clip(sys.argv[1], render_clip(progress=True).images)
