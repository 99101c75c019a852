"""From a sequence with ground truth to a prediction that can be held against it: picture sizes, forward passes, resizing back.

The official evaluation scripts differ in ways that are reproduced with `official=True`, to compare with published numbers:
  - pictures are stretched to 518 x 518, whatever their aspect ratio, without antialiasing (a bicubic resize to 518 wide comes first);
  - video depth is the z of the unprojected points in the world frame, not the depth map, although the cameras turn;
  - predictions of Sintel are cut at 70 after alignment, its market_5 is left out of video depth;
  - scale & shift is fitted by a thousand small steps of Adam.
Not reproduced, as no result is meant to depend on it: models left in training mode, whose step counter switches the mask off after
some sequences (mask_strength=0 repeats what the later ones get); "delta < 1", which is always 0; points computed for poses and thrown
away; images of all cameras against the poses of one.
Averages are those of the official scripts either way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.preprocess import DEFAULT_SIZE, PATCH, Size, check_size
from ..data.sample import Sample
from ..errors import InputError
from ..model import Page4D
from ..prediction import Prediction
from .depth import ALIGNMENTS


@dataclass(frozen=True)
class Protocol:
    """How to run and compare.

    size: of the network's input: the longer side, or a (height, width) to fit in with the aspect ratio kept, rounded to multiples of 14.
      With `official` the very size, square if it is one number.
    alignments: of video depth, any of "scale", "scale&shift", "median", "metric", one per sequence.
    mask_strength: None = what the weights come with.
    seed, max_points: the choice of points that are compared.
    """

    size: Size = DEFAULT_SIZE
    official: bool = False
    alignments: tuple[str, ...] = ("scale",)
    mask_strength: float | None = None
    max_points: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_size(self.size, "crop")
        unknown = [name for name in self.alignments if name not in ALIGNMENTS]
        if unknown or not self.alignments:
            raise InputError(f"unknown alignment {', '.join(unknown) or 'of no name'}: choose from {', '.join(ALIGNMENTS)}")


def network_size(original: tuple[int, int], protocol: Protocol) -> tuple[int, int]:
    """(H, W) of the network's input for pictures of the `original` (H, W)."""
    box = (protocol.size, protocol.size) if isinstance(protocol.size, int) else protocol.size
    if protocol.official:
        return box
    scale = min(box[0] / original[0], box[1] / original[1])
    height, width = (max(1, round(side * scale / PATCH)) * PATCH for side in original)
    return height, width


def network_images(images: Tensor, protocol: Protocol) -> Tensor:
    """Pictures (S, 3, H, W) at the network's size; nothing is cut or padded, as the truth is not either.

    The official loader cuts upright pictures to a square; all datasets here have wide ones.
    """
    original = (images.shape[-2], images.shape[-1])
    size = network_size(original, protocol)
    if not protocol.official:
        return images if size == original else _bicubic(images, size)
    width = size[1]  # as the official loader makes them, 8 bits deep, before the stretch
    height = max(1, round(original[0] * (width / original[1]) / PATCH)) * PATCH
    loaded = (_bicubic(images, (height, width)) * 255).round() / 255
    return F.interpolate(loaded, size=size, mode="bilinear", align_corners=False)


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def predict(model: Page4D, sample: Sample, outputs: Collection[str], protocol: Protocol, queries: Tensor | None = None) -> Prediction:
    """One forward pass over all frames of the sample; the result on the CPU. `queries` (N, 2) in pixels of the sample's first frame."""
    images = network_images(sample.images, protocol)
    if queries is not None:
        queries = rescale_pixels(queries, _size(sample.images), _size(images))
    return _forward(model, images, outputs, protocol, queries)


def predict_frames(model: Page4D, sample: Sample, protocol: Protocol) -> Tensor:
    """Depth maps (S, h, w), each from a forward pass over that frame alone."""
    images = network_images(sample.images, protocol)
    found = [_forward(model, image[None], ("depth",), protocol).depth for image in images]
    return torch.cat([depth[0, ..., 0] for depth in found if depth is not None])


def _forward(model: Page4D, images: Tensor, outputs: Collection[str], protocol: Protocol, queries: Tensor | None = None) -> Prediction:
    device = next((parameter.device for parameter in model.parameters()), images.device)
    points = None if queries is None else queries[None].to(device)
    with torch.inference_mode():
        return model(images[None].to(device), points, outputs=outputs, mask_strength=protocol.mask_strength).to("cpu")


def video_depth(prediction: Prediction, protocol: Protocol) -> Tensor:
    """Depth maps (S, h, w) of a whole sequence."""
    if protocol.official:
        return prediction.points("depth")[0][0, ..., 2]
    assert prediction.depth is not None
    return prediction.depth[0, ..., 0]


def resize_depth(depth: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Depth maps (S, h, w) at the size of the truth.

    "bicubic" (a = -0.75, no antialiasing, as OpenCV does it) is the protocol's for single frames, and the official script's; "bilinear",
    which stays within the range of its neighbours at edges, is used for video depth otherwise.
    """
    return F.interpolate(depth[:, None], size=size, mode=mode, align_corners=False)[:, 0]


def resize_points(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Point maps (S, h, w, 3) at the size of the truth, each pixel the nearest one's: between two surfaces there is no point."""
    return F.interpolate(points.permute(0, 3, 1, 2), size=size, mode="nearest-exact").permute(0, 2, 3, 1)


def rescale_pixels(xy: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Pixels (..., 2), x and y with centres at integers, of a picture of one (H, W) in the same picture at another."""
    ratio = torch.tensor([to_size[1] / from_size[1], to_size[0] / from_size[0]], dtype=torch.float64)
    return ((xy.double() + 0.5) * ratio - 0.5).to(xy.dtype)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
