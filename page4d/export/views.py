"""Pictures of a prediction, shared by the depth, mask, track and overview files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.frames import Frames
from ..errors import InputError
from ..prediction import Prediction
from ._percentiles import percentiles
from .color import colormap, distinct, to_uint8

GEOMETRY = ("depth", "depth_conf", "pose_enc")  # fields that points need
Pixels = NDArray[np.uint8]  # (H, W, 3)

MASK_COLOR = np.array([255, 32, 32], np.float32)
MOTION_LIMITS = (0.5, 1.0)  # transparent and full red; above 1/2 the camera tokens attend less to a patch
MOTION_TITLE = f"motion {MOTION_LIMITS[0]:g} (clear) to {MOTION_LIMITS[1]:g} (red)"
VISIBLE = 0.5  # probability from which a tracked point counts as visible
TAIL = 8  # number of past frames drawn for a track


def check(prediction: Prediction, frames: Frames, *needed: str) -> None:
    """Raise ValueError unless the prediction has one sequence of len(frames) frames, and InputError if it lacks a needed field."""
    if prediction.images.shape[0] != 1:
        raise ValueError(f"only one sequence can be exported at a time, this prediction holds {prediction.images.shape[0]}")
    if prediction.images.shape[1] != len(frames):
        raise ValueError(f"the prediction has {prediction.images.shape[1]} frames, but {len(frames)} were read")
    for name in needed:
        if getattr(prediction, name) is None:
            raise InputError(f"this prediction has no {_OUTPUTS[name]}")


_OUTPUTS = {
    "pose_enc": "cameras: run the model with 'camera' among its outputs",
    "depth": "depth: run the model with 'depth' among its outputs",
    "depth_conf": "depth confidence: run the model with 'depth' among its outputs",
    "world_points": "point map: run the model with 'points' among its outputs",
    "mask": "dynamics mask: run the model with 'mask' among its outputs",
    "track": "tracks: run the model with 'track' among its outputs, and give query points",
}


def array(tensor: Tensor) -> NDArray[Any]:
    """The first (and only) sequence as a numpy array. Half precision becomes float32."""
    value = tensor[0].detach().cpu()
    return (value.float() if value.is_floating_point() and value.dtype != torch.float64 else value).numpy()


def frame_pixels(prediction: Prediction, index: int) -> Pixels:
    """One frame (H, W, 3) uint8 at the network's size."""
    return to_uint8(prediction.images[0, index].detach().cpu().float().numpy()).transpose(1, 2, 0)


def inverse_depth_range(prediction: Prediction, frames: Frames) -> tuple[float, float]:
    """Percentiles 2 and 98 of 1 / depth over the valid pixels of the clip, so that all frames share one scale."""

    def inverses() -> Iterator[NDArray[Any]]:
        for i in range(len(frames)):
            depth = depth_map(prediction, frames, i)
            yield 1 / depth[is_depth(depth)]

    low, high = percentiles(inverses, (2, 98)) or (0.0, 1.0)
    return low, high


def is_depth(depth: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a depth is known: it is finite and positive."""
    return np.isfinite(depth) & (depth > 0)


def depth_picture(depth: NDArray[Any], limits: tuple[float, float]) -> Pixels:
    """Depth (H, W) in colours (H, W, 3), near = warm; grey where the depth is not valid."""
    low, high = limits
    inverse = np.divide(1, depth, out=np.full(depth.shape, np.nan), where=is_depth(depth))
    return colormap((inverse - low) / max(high - low, 1e-12))


def depth_map(prediction: Prediction, frames: Frames, index: int) -> NDArray[Any]:
    """The depth (H, W) of one frame, NaN in padding."""
    assert prediction.depth is not None
    return np.where(frames.frame(index).inside().numpy()[0], array(prediction.depth[:, index])[..., 0], np.nan)


def motion_map(prediction: Prediction, frames: Frames, index: int) -> NDArray[np.float32]:
    """The motion (H, W) of one frame, bilinearly resized to it, 0 in padding."""
    return np.where(frames.frame(index).inside()[0].numpy(), smooth_motion(prediction, index), 0)


def smooth_motion(prediction: Prediction, index: int) -> NDArray[np.float32]:
    """The motion (H, W) of one frame, bilinearly resized to it, also in padding."""
    motion = prediction.frame(index).motion.detach().cpu().float()
    return torch.nn.functional.interpolate(motion, size=prediction.images.shape[-2:], mode="bilinear")[0, 0].numpy()


def motion_picture(pixels: Pixels, motion: NDArray[np.float32]) -> Pixels:
    """A desaturated frame (H, W, 3) with a red overlay in proportion to its motion (H, W).

    The limits are the same for all clips. Limits from the clip itself would paint the noise of a static clip red.
    """
    low, high = MOTION_LIMITS
    alpha = 0.85 * np.nan_to_num((motion - low) / (high - low)).clip(0, 1)[..., None]
    grey = 0.6 * pixels.mean(-1, keepdims=True) + 0.4 * pixels
    return (grey * (1 - alpha) + MASK_COLOR * alpha + 0.5).astype(np.uint8)


def track_picture(prediction: Prediction, index: int) -> Image.Image:
    """A frame with all points in distinct colours and their past tracks. A hidden point is a ring with a dark core."""
    assert prediction.track is not None
    tracks = array(prediction.track[:, : index + 1])
    visible = np.ones(tracks.shape[1], bool) if prediction.vis is None else array(prediction.vis)[index] >= VISIBLE
    image = Image.fromarray(frame_pixels(prediction, index))
    draw = ImageDraw.Draw(image)
    radius = max(2.0, min(image.size) / 90)
    for n in range(tracks.shape[1]):
        color = distinct(n)
        past = tracks[max(0, index - TAIL) :, n]
        past = past[np.isfinite(past).all(-1)]
        if not np.isfinite(tracks[index, n]).all():
            continue
        if len(past) > 1:
            draw.line([(float(x), float(y)) for x, y in past], fill=color, width=max(1, round(radius / 2)))
        x, y = (float(value) for value in tracks[index, n])
        box = (x - radius, y - radius, x + radius, y + radius)
        if visible[n]:
            draw.ellipse(box, fill=color, outline=(0, 0, 0))
        else:
            draw.ellipse(box, fill=(0, 0, 0), outline=color)
    return image


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's default font. Without FreeType it is a bitmap font of fixed size."""
    return ImageFont.load_default(size)
