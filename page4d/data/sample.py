"""One sequence with its ground truth: what training and evaluation read, whatever it was made from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """S frames of H x W pixels. Conventions as everywhere: OpenCV cameras, pixel centres at integers, camera-from-world extrinsics.

    Lengths share one unit, which may be any. What a source does not know is None; what it does not know of single pixels is not `valid`.
    """

    images: Tensor  # (S, 3, H, W) in [0, 1]
    extrinsics: Tensor  # (S, 3, 4), camera-from-world
    intrinsics: Tensor  # (S, 3, 3), in pixels
    depth: Tensor | None = None  # (S, H, W), along the camera's z, 0 where it is not valid
    world_points: Tensor | None = None  # (S, H, W, 3), 0 where not valid
    valid: Tensor | None = None  # (S, H, W) bool
    dynamic: Tensor | None = None  # (S, H, W) bool: belongs to something that moves in the world
    object_id: Tensor | None = None  # (S, H, W) int64, 0 = background
    # (S - 1, H, W, 2): where the surface of a pixel goes in the next frame, x and y in pixels; 0 where not valid or behind that camera
    flow: Tensor | None = None
    tracks: Tensor | None = None  # (S, N, 2), x and y in pixels
    track_points: Tensor | None = None  # (S, N, 3), in the world
    track_visible: Tensor | None = None  # (S, N) bool
    name: str = ""

    def to(self, *args, **kwargs) -> Sample:
        """Every floating-point tensor through `Tensor.to`; the others follow to the device only."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved = value.to(*args, **kwargs)
                changed[field.name] = moved if value.is_floating_point() else value.to(moved.device)
        return replace(self, **changed)
