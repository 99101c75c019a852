"""From a sequence with ground truth to a comparable prediction: image sizes, forward passes, resizing back.

The official evaluation scripts differ from the defaults here. `official=True` reproduces, to compare with published numbers:
  - images are stretched to 518 x 518 without antialiasing, whatever their aspect ratio (after a bicubic resize to a width of 518);
  - video depth is the z of the unprojected points in the world frame instead of the depth map, although the cameras rotate;
  - on Sintel, predictions are clamped to 70 after alignment, and market_5 is left out of video depth;
  - scale & shift is fitted by a thousand small steps of Adam.

Four defects are not reproduced, because no result should depend on them:
  - the model stays in training mode, and its step counter switches the mask off after some sequences (mask_strength=0 repeats the result
    of the later sequences);
  - "delta < 1" is always 0;
  - points are computed for poses and discarded;
  - images of all cameras are compared with the poses of one.

Averages are those of the official scripts in both cases.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..config import Layer
from ..data.preprocess import DEFAULT_SIZE, PATCH, Size, check_size
from ..data.sample import Sample
from ..errors import InputError
from ..execution.attention_plan import AttentionPlan
from ..long_video import passes
from ..long_video.chunks import Chunking
from ..long_video.run import LongVideo
from ..long_video.store import Store
from ..model import Page4D
from ..prediction import Prediction
from .depth import ALIGNMENTS


@dataclass(frozen=True)
class Protocol:
    """How to run the model and compare.

    size: size of the network's input: the longer side, or a (height, width) to fit into. The aspect ratio is kept, and sides are rounded
      to multiples of 14. With `official` it is the exact size, square for a single number.
    official: repeat the official scripts, see above.
    alignments: alignments of video depth, any of "scale", "scale&shift", "median", "metric". Each is computed once per sequence.
    mask_strength: strength of the dynamics mask. None = as stored in the weights.
    attention: what the patches of each global layer see, see `AttentionPlan.of`. None: everything.
    chunk, loops: run longer sequences in chunks, and look for loops then (docs/long_video.md). None: one pass over all frames.
    max_points, seed: how many points are compared, and the seed of their choice.

    Raises:
        InputError: a size is not a multiple of 14, or an alignment is unknown or missing.
    """

    size: Size = DEFAULT_SIZE
    official: bool = False
    alignments: tuple[str, ...] = ("scale",)
    mask_strength: float | None = None
    attention: AttentionPlan | str | Path | Sequence[Layer] | None = None
    chunk: Chunking | None = None
    loops: bool = True
    max_points: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_size(self.size, "crop")
        if not self.alignments:
            raise InputError(f"no alignment is named: choose from {', '.join(ALIGNMENTS)}")
        unknown = [name for name in self.alignments if name not in ALIGNMENTS]
        if unknown:
            raise InputError(f"unknown alignment {', '.join(unknown)}: choose from {', '.join(ALIGNMENTS)}")


def network_size(original: tuple[int, int], protocol: Protocol) -> tuple[int, int]:
    """(H, W) of the network's input for images of size `original` (H, W)."""
    box = (protocol.size, protocol.size) if isinstance(protocol.size, int) else protocol.size
    if protocol.official:
        return box
    scale = min(box[0] / original[0], box[1] / original[1])
    height, width = (max(1, round(side * scale / PATCH)) * PATCH for side in original)
    return height, width


def network_images(images: Tensor, protocol: Protocol) -> Tensor:
    """Images (S, 3, H, W) resized to the network's input. Nothing is cropped or padded, as the ground truth is not either.

    The official loader crops portrait images to a square. All datasets here have landscape images.
    """
    original = (images.shape[-2], images.shape[-1])
    size = network_size(original, protocol)
    if not protocol.official:
        return images if size == original else _bicubic(images, size)
    width = size[1]  # the official loader resizes to 8-bit images first, then stretches
    height = max(1, round(original[0] * (width / original[1]) / PATCH)) * PATCH
    loaded = (_bicubic(images, (height, width)) * 255).round() / 255
    return F.interpolate(loaded, size=size, mode="bilinear", align_corners=False)


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def predict(model: Page4D, sample: Sample, outputs: Collection[str], protocol: Protocol, queries: Tensor | None = None) -> Prediction:
    """The prediction of one forward pass over all frames, on the CPU. `queries` (N, 2) are in pixels of the sample's first frame."""
    images = network_images(sample.images, protocol)
    if queries is not None:
        queries = rescale_pixels(queries, _size(sample.images), _size(images))
    return _forward(model, images, outputs, protocol, queries)


def predict_in_chunks(model: Page4D, sample: Sample, outputs: Collection[str], protocol: Protocol, chunk: Chunking) -> LongVideo:
    """The prediction in chunks, whose results lie in a temporary folder meanwhile."""
    images = network_images(sample.images, protocol)
    attention = AttentionPlan.of(protocol.attention, model.config)
    with tempfile.TemporaryDirectory(prefix="page4d-") as folder:
        store = Store(Path(folder) / "chunks", {})
        options: dict[str, Any] = {"outputs": outputs, "attention": attention, "mask_strength": protocol.mask_strength}
        return passes.predict_in_chunks(model, images, chunk, store, lambda _, shape: torch.empty(shape), loops=protocol.loops, **options)


def predict_frames(model: Page4D, sample: Sample, protocol: Protocol) -> Tensor:
    """Depth maps (S, h, w), each from a separate forward pass over that frame."""
    images = network_images(sample.images, protocol)
    found = [_forward(model, image[None], ("depth",), protocol).depth for image in images]
    return torch.cat([depth[0, ..., 0] for depth in found if depth is not None])


def _forward(model: Page4D, images: Tensor, outputs: Collection[str], protocol: Protocol, queries: Tensor | None = None) -> Prediction:
    device = next((parameter.device for parameter in model.parameters()), images.device)
    points = None if queries is None else queries[None].to(device)
    with torch.inference_mode():
        options: dict[str, Any] = {"mask_strength": protocol.mask_strength, "attention": protocol.attention}
        return model(images[None].to(device), points, outputs=outputs, **options).to("cpu")


def video_depth(prediction: Prediction, protocol: Protocol) -> Tensor:
    """Depth maps (S, h, w) of a sequence."""
    if protocol.official:
        return prediction.points("depth")[0][0, ..., 2]
    assert prediction.depth is not None
    return prediction.depth[0, ..., 0]


def resize_depth(depth: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Depth maps (S, h, w) resized to `size` (H, W), the size of the truth.

    The protocol for single frames and the official scripts use "bicubic" (a = -0.75, no antialiasing, as in OpenCV). Video depth otherwise
    uses "bilinear", which stays within the range of the neighbouring values at edges.
    """
    return F.interpolate(depth[:, None], size=size, mode=mode, align_corners=False)[:, 0]


def resize_points(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Point maps (S, h, w, 3) resized to `size` (H, W), the size of the truth, by nearest neighbour.

    A blend of the points of two surfaces would lie on neither.
    """
    resized = F.interpolate(rearrange(points, "s h w c -> s c h w"), size=size, mode="nearest-exact")
    return rearrange(resized, "s c h w -> s h w c")


def rescale_pixels(xy: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Pixel coordinates (..., 2), x and y with centres at integers, converted from an image of one (H, W) to another size of that image."""
    ratio = torch.tensor([to_size[1] / from_size[1], to_size[0] / from_size[0]], dtype=torch.float64)
    return ((xy.double() + 0.5) * ratio - 0.5).to(xy.dtype)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
