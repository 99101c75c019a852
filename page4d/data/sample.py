"""One sequence with its ground truth, as training and evaluation read it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """S frames of H x W pixels. Conventions as everywhere: OpenCV cameras, pixel centres at integers, camera-from-world extrinsics.

    All lengths are in one unit, which is arbitrary. A field is None if the source has no such ground truth. Pixels without ground truth are
    not `valid`. A batch has a further dimension B in front.
    """

    images: Tensor  # (S, 3, H, W) in [0, 1]
    extrinsics: Tensor  # (S, 3, 4), camera-from-world
    intrinsics: Tensor  # (S, 3, 3), in pixels
    depth: Tensor | None = None  # (S, H, W), along the camera's z; 0 where not valid
    world_points: Tensor | None = None  # (S, H, W, 3); 0 where not valid
    valid: Tensor | None = None  # (S, H, W) bool
    dynamic: Tensor | None = None  # (S, H, W) bool: the pixel shows something that moves in the world
    object_id: Tensor | None = None  # (S, H, W) int64, 0 = background
    # (S - 1, H, W, 2): motion of the surface in a pixel to the next frame, x and y in pixels; 0 if not valid or behind that camera
    flow: Tensor | None = None
    tracks: Tensor | None = None  # (S, N, 2), x and y in pixels
    track_points: Tensor | None = None  # (S, N, 3), in the world
    track_visible: Tensor | None = None  # (S, N) bool
    name: str = ""

    def to(self, *args, **kwargs) -> Sample:
        """Apply `Tensor.to` to every floating-point tensor. The other tensors only change device."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved = value.to(*args, **kwargs)
                changed[field.name] = moved if value.is_floating_point() else value.to(moved.device)
        return replace(self, **changed)
