"""The scene as binary glTF 2.0: points, cameras, and what moves as an animation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.frames import Frames
from ..files import AtomicFiles
from ..geometry import matrix_to_quaternion
from ..prediction import Prediction
from .color import colormap
from .extras import need
from .frusta import frustum_length, frustum_segments
from .options import DEFAULTS, ExportOptions
from .scene import SceneCameras, confident_points, gather, registered, scene_cameras

MAX_POINTS = 1_000_000
Y_UP = np.diag([1.0, -1, -1, 1])  # from OpenCV's axes (y down, z forward) to glTF's (y up, z back), of the world and of cameras
FLOAT = 5126  # the component type of glTF
NEAR = 0.1  # of the camera, in lengths of a frustum


def write_glb(out_dir: Path, prediction: Prediction, frames: Frames, options: ExportOptions = DEFAULTS) -> list[Path]:
    """Write `scene.glb`. Returns its path.

    World: the axes of the first camera with y up (x right, z back), scene units, so that a viewer's first look is that of the first camera.
    Nodes: `static` (points of all frames that stand still), `moving` (or `moving/<name>` for each frame), `frusta` and `path` (lines,
    coloured from the first frame to the last), and `camera`, a glTF camera with the field of view of the first frame.
    At most a million points. Colours are linear, as glTF wants them.

    `options.glb`: "animated" shows in each frame what moves there, at the times of the frames, and moves `camera` along the path; "all"
    shows all moving points at once; "static" leaves them out. Programs that play no animations show what moves in the first frame.

    Raises:
        InputError: trimesh is not installed, or no frame has a finite camera.
    """
    trimesh = need("trimesh", "glb files")
    cameras = scene_cameras(prediction, frames)
    chosen = registered(cameras, frames, "glb")
    scene, length = trimesh.Scene(), frustum_length(prediction, frames)
    _add_points(scene, trimesh, prediction, frames, options)
    _add_cameras(scene, trimesh, cameras, frames, chosen, length)
    animated = options.glb == "animated" and len(chosen) > 1

    def finish(buffers: dict, tree: dict) -> None:
        _linear_colors(buffers, tree)
        camera = _place_camera(tree, cameras, frames, chosen[0], length)
        if animated:
            _animate(buffers, tree, camera, cameras, frames, chosen)

    with AtomicFiles() as files:
        files.add(Path(out_dir) / "scene.glb").write_bytes(trimesh.exchange.gltf.export_glb(scene, buffer_postprocessor=finish))
    return files.paths


def _add_points(scene: Any, trimesh: Any, prediction: Prediction, frames: Frames, options: ExportOptions) -> None:
    static_only = options.glb == "static"
    parts = confident_points(prediction, frames, max_points=MAX_POINTS, moving=options.moving, static_only=static_only)
    points, counts = gather(parts, min(MAX_POINTS, prediction.images[0, :, 0].numel()))

    def add(name: str, part: slice, chosen: NDArray[np.bool_]) -> None:
        if chosen.any():
            xyz, rgb = points.xyz[part][chosen], points.rgb[part][chosen]
            colors = np.concatenate([rgb, np.full_like(rgb[:, :1], 255)], 1)
            scene.add_geometry(trimesh.PointCloud(xyz @ Y_UP[:3, :3].T, colors), name, name)

    everything = slice(None)
    add("static", everything, ~points.moving)
    if options.glb == "all":
        add("moving", everything, points.moving)
    elif options.glb == "animated":
        ends = np.cumsum(counts).tolist()
        for name, count, end in zip(frames.names, counts, ends, strict=True):
            part = slice(end - count, end)
            add(f"moving/{name}", part, points.moving[part])


def _add_cameras(scene: Any, trimesh: Any, cameras: SceneCameras, frames: Frames, chosen: list[int], length: float) -> None:
    turn = Y_UP[:3, :3].T
    frusta = np.concatenate([frustum_segments(cameras, frames, i, length) for i in chosen]) @ turn
    centres = cameras.world_from_camera[chosen, :3, 3] @ turn
    times = colormap(np.linspace(0, 1, len(chosen)))
    _add_lines(scene, trimesh, "frusta", frusta, np.repeat(times, 8, 0))
    if len(chosen) > 1 and (centres[1:] != centres[:-1]).any():
        _add_lines(scene, trimesh, "path", np.stack([centres[:-1], centres[1:]], 1), times[1:])


def _add_lines(scene: Any, trimesh: Any, name: str, segments: NDArray[np.float64], rgb: NDArray[np.uint8]) -> None:
    """Segments (N, 2, 3) with colours (N, 3)."""
    entities = [trimesh.path.entities.Line([2 * n, 2 * n + 1], color=(*color, 255)) for n, color in enumerate(rgb.tolist())]
    scene.add_geometry(trimesh.path.Path3D(entities, segments.reshape(-1, 3), process=False), name, name)


def _linear_colors(buffers: dict, tree: dict) -> None:
    """Replace the colours of 8 bits, which are those of a picture (sRGB), by linear ones in fp32."""
    accessors = list(tree["accessors"].values())
    for place in {primitive["attributes"]["COLOR_0"] for mesh in tree["meshes"] for primitive in mesh["primitives"]}:
        accessor = accessors[place]
        key = list(buffers)[accessor["bufferView"]]
        srgb = np.frombuffer(buffers[key], np.uint8)[: 4 * accessor["count"]].reshape(-1, 4)[:, :3] / 255
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype("<f4")
        buffers[key] = linear.tobytes()
        accessor |= {"componentType": FLOAT, "type": "VEC3", "min": linear.min(0).tolist(), "max": linear.max(0).tolist()}
        del accessor["normalized"]


def _place_camera(tree: dict, cameras: SceneCameras, frames: Frames, index: int, length: float) -> int:
    """Add a glTF camera with the view of a frame. Returns its node."""
    height, width = frames.original_sizes[index]
    across, down = width / 2 / cameras.original[index, 0, 0], height / 2 / cameras.original[index, 1, 1]
    view = {"aspectRatio": across / down, "yfov": 2 * float(np.arctan(down)), "znear": NEAR * length}
    tree["cameras"] = [{"type": "perspective", "perspective": view}]
    translation, rotation = _camera_pose(cameras, [index])
    node = {"name": "camera", "camera": 0, "translation": translation[0].tolist(), "rotation": rotation[0].tolist()}
    tree["nodes"].append(node)
    tree["scenes"][0]["nodes"].append(len(tree["nodes"]) - 1)
    return len(tree["nodes"]) - 1


def _camera_pose(cameras: SceneCameras, chosen: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Positions (N, 3) and rotations (N, 4; x, y, z, w) of the cameras in glTF's axes. Neighbouring rotations take the short way."""
    import torch

    poses = Y_UP @ cameras.world_from_camera[chosen] @ Y_UP
    rotation = matrix_to_quaternion(torch.from_numpy(poses[:, :3, :3])).numpy()
    for n in range(1, len(rotation)):
        if rotation[n] @ rotation[n - 1] < 0:
            rotation[n] *= -1
    return poses[:, :3, 3].astype(np.float32), rotation.astype(np.float32)


def _animate(buffers: dict, tree: dict, camera: int, cameras: SceneCameras, frames: Frames, chosen: list[int]) -> None:
    """Show the node of each frame at its time alone, by its scale, and move the camera."""
    start = frames.timestamps[chosen[0]]
    times = np.array([frames.timestamps[i] - start for i in chosen], np.float32)
    for n in range(1, len(times)):  # glTF wants times that increase, and pictures may share one
        times[n] = max(times[n], np.nextafter(times[n - 1], np.float32(np.inf)))
    samplers: list[dict] = []
    channels: list[dict] = []

    def channel(node: int, path: str, at: NDArray[np.float32], values: NDArray[np.float32], interpolation: str) -> None:
        sampler = {"input": _append(buffers, tree, at), "output": _append(buffers, tree, values), "interpolation": interpolation}
        samplers.append(sampler)
        channels.append({"sampler": len(samplers) - 1, "target": {"node": node, "path": path}})

    nodes = {node.get("name"): number for number, node in enumerate(tree["nodes"])}
    for n, i in enumerate(chosen):
        node = nodes.get(f"moving/{frames.names[i]}")
        if node is None:
            continue  # nothing moves in this frame
        visible = np.zeros(len(times), np.float32)
        visible[n] = 1
        tree["nodes"][node].pop("matrix", None)
        tree["nodes"][node]["scale"] = [float(visible[0])] * 3
        keys = sorted({0, n, min(n + 1, len(times) - 1)} | ({n - 1} if n else set()))
        channel(node, "scale", times[keys], np.repeat(visible[keys, None], 3, 1), "STEP")
    translation, rotation = _camera_pose(cameras, chosen)
    channel(camera, "translation", times, translation, "LINEAR")
    channel(camera, "rotation", times, rotation, "LINEAR")
    tree["animations"] = [{"name": "frames", "samplers": samplers, "channels": channels}]


def _append(buffers: dict, tree: dict, values: NDArray[np.float32]) -> int:
    """Store fp32 numbers (N,), (N, 3) or (N, 4). Returns the number of their accessor."""
    kind = "SCALAR" if values.ndim == 1 else f"VEC{values.shape[1]}"
    flat = values.reshape(len(values), -1)
    buffers[f"animation {len(buffers)}"] = values.astype("<f4").tobytes()
    tree["accessors"][f"animation {len(tree['accessors'])}"] = {
        "bufferView": len(buffers) - 1,
        "componentType": FLOAT,
        "count": len(values),
        "type": kind,
        "min": flat.min(0).tolist(),
        "max": flat.max(0).tolist(),
    }
    return len(tree["accessors"]) - 1
