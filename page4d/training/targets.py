"""Ground truth in the coordinate frame and unit of the model's predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.sample import Sample


def collate(samples: list[Sample]) -> Sample:
    """Stack samples of equal shapes along a new first dimension. A field that is None in one sample is None in the batch."""
    stacked: dict[str, Any] = {}
    for key, value in vars(samples[0]).items():
        values = [getattr(sample, key) for sample in samples]
        if isinstance(value, Tensor):
            stacked[key] = torch.stack(values) if all(x is not None for x in values) else None
    return Sample(**stacked)


def normalise(batch: Sample) -> Sample:
    """Cameras and points (B, S, ...) relative to the first camera, in units of the mean distance of the scene's points, in fp32.

    With E_i the extrinsics and X the valid world points of a sequence: E_i <- E_i E_0^-1, X <- E_0 X, and t, X and depth are divided by
    sum |X| / (n + 1e-3), clamped to [1e-6, 1e6]. Lengths that are not finite become 0. A sequence has no valid pixels if its first frame
    has none, or if a rotation is not finite. Source: training of VGGT / PAGE-4D.
    """
    batch = batch.to(torch.float32)
    depth, points, valid = batch.depth, batch.world_points, batch.valid
    assert depth is not None and points is not None and valid is not None
    rotation, translation = batch.extrinsics[..., :3], batch.extrinsics[..., 3]
    known = rotation.isfinite().flatten(1).all(1)  # (B,)
    rotation = torch.where(known[:, None, None, None], rotation, torch.eye(3, device=rotation.device))
    first, origin = rotation[:, :1], translation[:, :1]
    points = torch.einsum("bij,bshwj->bshwi", first[:, 0], points) + origin[:, :, None, None]
    turned = rotation @ first.transpose(-1, -2)
    moved = translation - torch.einsum("bsij,bsj->bsi", turned, origin.expand_as(translation))
    valid = valid & (known & valid[:, 0].flatten(1).any(1))[:, None, None, None]
    distance = torch.where(valid, points.norm(dim=-1), 0.0).nan_to_num(0, 0, 0)
    scale = (distance.flatten(1).sum(1) / (valid.flatten(1).sum(1) + 1e-3)).clamp(1e-6, 1e6)

    def finite(x: Tensor) -> Tensor:
        return (x / scale.view(-1, *[1] * (x.dim() - 1))).nan_to_num(0, 0, 0)

    track_points = batch.track_points
    if track_points is not None:
        track_points = finite(torch.einsum("bij,bsnj->bsni", first[:, 0], track_points) + origin[:, :, None])
    return replace(
        batch,
        extrinsics=torch.cat([turned, finite(moved)[..., None]], -1),
        world_points=torch.where(valid[..., None], finite(points), 0.0),
        depth=torch.where(valid, finite(depth), 0.0),
        valid=valid,
        track_points=track_points,
    )
