"""One picture as an overview of a result: frames, depth, mask and tracks in rows, and the camera path from above."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..data.frames import Frames
from ..files import AtomicFiles
from ..prediction import Prediction
from .color import colormap
from .scene import confident_points
from .views import (
    MOTION_TITLE,
    array,
    check,
    depth_map,
    depth_picture,
    font,
    frame_pixels,
    inverse_depth_range,
    motion_map,
    motion_picture,
    track_picture,
)

COLUMNS = 6
TILE_AREA = 240 * 180  # area of a frame in pixels, for any aspect ratio
MARGIN, GAP, TITLE = 28, 10, 30
INK, FAINT, PAPER, PANEL = (32, 34, 40), (120, 124, 132), (255, 255, 255), (244, 245, 247)
OVERSAMPLE = 2  # the path is drawn larger and reduced, as Pillow does not antialias lines
DOT = 3  # size of a point in oversampled pixels

Row = tuple[str, list[Image.Image]]


def write_overview(path: str | Path, prediction: Prediction, frames: Frames) -> list[Path]:
    """Write `overview.png`, with a row or panel for each output that is present. Returns its path."""
    check(prediction, frames)
    picture = overview(prediction, frames)
    with AtomicFiles() as files:
        picture.save(files.add(Path(path)))
    return files.paths


def overview(prediction: Prediction, frames: Frames) -> Image.Image:
    """The overview as an RGB image."""
    height, width = prediction.images.shape[-2:]
    count = len(frames)
    columns = sorted({round(i * (count - 1) / max(1, min(COLUMNS, count) - 1)) for i in range(min(COLUMNS, count))})
    shrink = (TILE_AREA / (height * width)) ** 0.5
    tile = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    rows = list(_rows(prediction, frames, columns))
    widest_title = max(font(15).getlength(title) for title, _ in rows)
    block_width = max(len(columns) * (tile[0] + GAP) - GAP, round(widest_title))
    block_height = len(rows) * (TITLE + tile[1] + GAP) - GAP
    panel = None
    if prediction.pose_enc is not None:
        side = max(block_height - TITLE, 420)
        panel = _top_view(prediction, frames, side)
    heading = 44
    total = (
        2 * MARGIN + block_width + (panel.width + 3 * GAP if panel else 0),
        2 * MARGIN + heading + max(block_height, panel.height + TITLE if panel else 0),
    )
    canvas = Image.new("RGB", total, PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 6), f"{count} frame{'' if count == 1 else 's'} of {height} x {width}", font=font(22), fill=INK)
    y = MARGIN + heading
    for title, images in rows:
        draw.text((MARGIN, y), title, font=font(15), fill=FAINT)
        for column, image in enumerate(images):
            canvas.paste(image.resize(tile, Image.Resampling.LANCZOS), (MARGIN + column * (tile[0] + GAP), y + TITLE - 6))
        y += TITLE + tile[1] + GAP
    if panel:
        x = MARGIN + block_width + 3 * GAP
        draw.text((x, MARGIN + heading), "camera path from above, first frame pointing up", font=font(15), fill=FAINT)
        canvas.paste(panel, (x, MARGIN + heading + TITLE - 6))
    return canvas


def _rows(prediction: Prediction, frames: Frames, columns: list[int]) -> Iterator[Row]:
    pixels = {i: frame_pixels(prediction, i) for i in columns}
    names = f"{frames.names[columns[0]]} to {frames.names[columns[-1]]}" if len(columns) > 1 else frames.names[0]
    names = names.encode("utf-8", "replace").decode()  # names of files may hold what is no text
    yield f"frames: {names if len(names) < 60 else names[:57] + '...'}", [Image.fromarray(pixels[i]) for i in columns]
    if prediction.depth is not None:
        limits = inverse_depth_range(prediction, frames)
        far, near = (f"{1 / value:.3g}" if value > 0 else "-" for value in limits)
        pictures = [Image.fromarray(depth_picture(depth_map(prediction, frames, i), limits)) for i in columns]
        yield f"depth: {near} (red) to {far} (blue), scene units", pictures
    if prediction.mask is not None:
        pictures = [Image.fromarray(motion_picture(pixels[i], motion_map(prediction, frames, i))) for i in columns]
        yield f"dynamics mask: {MOTION_TITLE}", pictures
    if prediction.track is not None:
        yield f"tracks: {prediction.track.shape[2]} points, rings where hidden", [track_picture(prediction, i) for i in columns]


def _top_view(prediction: Prediction, frames: Frames, side: int) -> Image.Image:
    """The x-z plane of the world in side x side pixels: cameras coloured by time, over the confident points.

    It is rotated so that the first camera looks up.
    """
    cameras = prediction.cameras
    centers = array(cameras.centers)[:, [0, 2]]
    axes = array(cameras.world_from_camera)[:, :, :3][:, [0, 2]]  # (S, 2, 3): the cameras' axes seen from above
    points, colors = _faint_points(prediction, frames)
    finite = np.isfinite(centers).all(-1) & np.isfinite(axes).all((1, 2))
    centers, axes = centers[finite], axes[finite]
    size = side * OVERSAMPLE
    canvas = Image.new("RGB", (size, size), PANEL)
    draw = ImageDraw.Draw(canvas)
    if len(centers):
        turn = _heading_up(axes[0, :, 2])
        centers, axes, points = centers @ turn.T, turn @ axes, points @ turn.T
        to_pixels, unit = _fit(centers, points, size)
        _scatter(canvas, to_pixels(points), colors)
        times = np.flatnonzero(finite) / max(1, len(finite) - 1)
        _draw_path(draw, to_pixels(centers), axes, [tuple(c) for c in colormap(times).tolist()], size)
        _draw_scale(draw, unit, size)
    draw.rectangle((0, 0, size - 1, size - 1), outline=(210, 212, 216), width=OVERSAMPLE)
    return canvas.resize((side, side), Image.Resampling.LANCZOS)


def _faint_points(prediction: Prediction, frames: Frames) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Positions (N, 2) in x, z and colours (N, 3) of confident points. N is 0 if the prediction has no geometry."""
    if prediction.depth is not None and prediction.depth_conf is not None:
        source = "depth"
    elif prediction.world_points is not None and prediction.world_points_conf is not None:
        source = "head"
    else:
        return np.zeros((0, 2)), np.zeros((0, 3), np.uint8)
    parts = list(confident_points(prediction, frames, source=source, max_points=120_000))
    return np.concatenate([part.xyz[:, [0, 2]] for part in parts]), np.concatenate([part.rgb for part in parts])


def _heading_up(heading: NDArray[Any]) -> NDArray[Any]:
    """The rotation (2, 2) that maps a direction in x, z to +z."""
    angle = np.arctan2(*heading)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _fit(centers: NDArray[Any], points: NDArray[Any], size: int) -> tuple[Any, float]:
    """The map from x, z to pixels (z up) that shows all cameras and most points, and its number of pixels per unit."""
    shown = centers
    if len(points):
        shown = np.concatenate([centers, np.percentile(points, (3, 97), axis=0)])
    low, high = shown.min(0), shown.max(0)
    extent = float((high - low).max())
    unit = 0.84 * size / (extent if extent > 1e-9 else 1.0)
    middle = (low + high) / 2

    def to_pixels(xz: NDArray[Any]) -> NDArray[Any]:
        return (xz - middle) * np.array([unit, -unit]) + size / 2

    return to_pixels, unit


def _scatter(canvas: Image.Image, places: NDArray[Any], colors: NDArray[np.uint8]) -> None:
    """Draw the points in pale colours on the panel."""
    pixels = np.array(canvas)
    limit = canvas.width - DOT
    xy = np.nan_to_num(places).clip(-1, limit).astype(int)
    inside = ((xy >= 0) & (xy < limit)).all(-1)
    xy, blended = xy[inside], (0.65 * colors[inside] + 0.35 * np.array(PANEL)).astype(np.uint8)
    for dx in range(DOT):
        for dy in range(DOT):
            pixels[xy[:, 1] + dy, xy[:, 0] + dx] = blended
    canvas.paste(Image.fromarray(pixels))


def _draw_path(draw: ImageDraw.ImageDraw, places: NDArray[Any], axes: NDArray[Any], colors: list[Any], size: int) -> None:
    """Draw the path, view cones of up to 10 cameras, and rings at the first and last camera."""
    line = max(2, size // 240)
    for i in range(1, len(places)):
        draw.line([tuple(places[i - 1]), tuple(places[i])], fill=colors[i], width=2 * line)
    shown = np.unique(np.linspace(0, len(places) - 1, min(10, len(places))).round().astype(int))
    reach = size / 20
    for i in shown:
        right, forward = axes[i, :, 0] * (1, -1), axes[i, :, 2] * (1, -1)
        corners = [places[i] + reach * (forward + 0.6 * sign * right) for sign in (-1, 1)]
        draw.line([tuple(p) for p in (places[i], *corners, places[i])], fill=colors[i], width=line, joint="curve")
    for index, name in ((0, "first"), (len(places) - 1, "last")):
        x, y = places[index]
        radius = 2.5 * line
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colors[index], outline=PAPER, width=line // 2)
        if len(places) > 1:
            draw.text((x + 2 * radius, y + radius), name, font=font(13 * OVERSAMPLE), fill=INK, stroke_width=3, stroke_fill=PANEL)


def _draw_scale(draw: ImageDraw.ImageDraw, unit: float, size: int) -> None:
    """Draw a scale bar of 1, 2 or 5 times a power of ten scene units, about a fifth of the panel wide."""
    target = 0.2 * size / unit
    power = 10 ** np.floor(np.log10(target))
    length = float(power * max(step for step in (1, 2, 5) if step * power <= target * 1.0001))
    x, y = size * 0.04, size * 0.96
    draw.line([(x, y), (x + length * unit, y)], fill=INK, width=2 * OVERSAMPLE)
    draw.text((x, y - 20 * OVERSAMPLE), f"{length:g} scene unit{'' if length == 1 else 's'}", font=font(13 * OVERSAMPLE), fill=INK)
