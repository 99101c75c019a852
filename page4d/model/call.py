"""What a forward pass is given, checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from page4d_kernels.ops import _checks

from ..config import Layer, Page4DConfig
from ..errors import InputError
from ..execution.attention_plan import AttentionPlan, check_rows
from ..files import Allocate

if TYPE_CHECKING:
    from .page4d import Page4D

RANGE_SLACK = 0.5
MOST_STRENGTH = 1e9
OUTPUTS = ("camera", "depth", "points", "mask")  # tracks come with query points


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of `Page4D.forward`."""

    images: Tensor  # (B, S, 3, H, W)
    query_points: Tensor | None  # (B, N, 2)
    wanted: set[str]  # outputs
    strength: float  # of the mask
    memory_budget: int | None
    allocate: Allocate | None
    plan: AttentionPlan | None  # None: exact
    checked: int
    config: Page4DConfig

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same on all ranks that share a sequence, by its name for users, as JSON."""
        batch, _, _, height, width = self.images.shape
        return {
            "number of sequences": batch,
            "image size": [height, width],
            "outputs": sorted(self.wanted),
            "mask_strength": self.strength,
            "attention plan": None if self.plan is None else self.plan.to_json(),
            "attention_check": self.checked,
            "query_points": None if self.query_points is None else self.query_points.detach().flatten().tolist(),
            "model configuration": self.config.to_json(),
            "use of gradients": torch.is_grad_enabled(),
        }


def checked_call(
    model: Page4D,
    images: Tensor,
    query_points: Tensor | None,
    outputs: Collection[str] | None,
    mask_strength: float | None,
    memory_budget: int | None,
    allocate: Allocate | None,
    attention: AttentionPlan | str | Path | Sequence[Layer] | None,
    attention_check: int,
) -> Call:
    """The arguments of `Page4D.forward` without what may be left out. InputError if they do not fit."""
    if memory_budget is not None and memory_budget < 0:
        raise InputError(f"memory_budget must be a number of bytes, at least 0, not {memory_budget}")
    images = _tensor(images, "images")
    query_points = None if query_points is None else _tensor(query_points, "query_points")
    if images.dim() == 4:
        images = images.unsqueeze(0)
    if query_points is not None and query_points.dim() == 2:
        query_points = query_points.unsqueeze(0)
    strength = model.config.mask_strength if mask_strength is None else mask_strength
    wanted = wanted_outputs(model, outputs, query_points)
    _check(model, images, query_points)
    _check_mask(model, images, strength, "mask" in wanted)
    plan = None if attention is None else AttentionPlan.of(attention, model.config)
    check_rows(attention_check)
    plan = None if plan is None or plan.exact else plan
    return Call(images, query_points, wanted, strength, memory_budget, allocate, plan, attention_check, model.config)


def wanted_outputs(model: Page4D, outputs: Collection[str] | None, query_points: Tensor | None) -> set[str]:
    if isinstance(outputs, str):
        raise InputError(f"outputs must be a collection of names, such as [{outputs!r}], not one string")
    wanted = model.available & set(OUTPUTS) if outputs is None else set(outputs)
    unknown = sorted(wanted - set(OUTPUTS))
    if unknown:
        raise InputError(
            f"unknown output {', '.join(map(repr, unknown))}: choose from {', '.join(OUTPUTS)} (tracks come with query points)"
        )
    if query_points is not None:
        wanted.add("track")
    absent = sorted(wanted - model.available)
    if absent:
        raise InputError(f"this model has no {' and no '.join(absent)} head: its weights came without one, so do not ask for that output")
    if not wanted:
        raise InputError("no output is asked for")
    return wanted


def _check(model: Page4D, images: Tensor, query_points: Tensor | None) -> None:
    if images.dim() != 5 or images.shape[2] != 3:
        raise InputError(f"images must be (B, S, 3, H, W) or (S, 3, H, W), not {tuple(images.shape)}")
    if images.layout != torch.strided:
        raise InputError(f"images must be a dense tensor, not {images.layout}")
    if not images.is_floating_point():
        raise InputError(f"images must be floating point in [0, 1], not {images.dtype}: convert and divide by 255")
    _check_values(images)
    batch, frames, _, height, width = images.shape
    if batch == 0 or frames == 0:
        raise InputError(f"there is no frame in images of shape {tuple(images.shape)}")
    patch = model.config.patch_size
    if height % patch or width % patch or not height or not width:
        nearest = tuple(max(round(size / patch), 1) * patch for size in (height, width))
        raise InputError(
            f"image height and width must be multiples of {patch}, not {height} x {width}: resize to {nearest[0]} x {nearest[1]}"
        )
    if query_points is None or model.track_head is None:
        return
    if query_points.dim() != 3 or query_points.shape[0] != batch or query_points.shape[2] != 2 or not query_points.shape[1]:
        raise InputError(f"query_points must be ({batch}, N, 2) or (N, 2) with N >= 1, not {tuple(query_points.shape)}")
    smallest = model.track_head.smallest_image
    if min(height, width) < smallest:
        raise InputError(f"tracking needs images of at least {smallest} x {smallest} pixels, not {height} x {width}: use a larger size")


def _check_mask(model: Page4D, images: Tensor, strength: float, wanted: bool) -> None:
    if not 0 <= strength <= MOST_STRENGTH:
        raise InputError(f"mask_strength must be at least 0 and finite, at most {MOST_STRENGTH:g}, not {strength}")
    if strength > 0 and model.aggregator.spatial_mask_head is None:
        raise InputError(f"mask_strength {strength} needs a mask head, and this model has none: use 0")
    if strength > 0 and model.config.masked_blocks[0] == model.config.masked_blocks[1]:
        raise InputError(f"mask_strength {strength} has no effect: this configuration masks no block; use 0")
    if (strength > 0 or wanted) and images.shape[-2:] == (model.config.patch_size, model.config.patch_size):
        raise InputError("the dynamics mask needs at least two patches, and the image is a single one: use a larger size")


def _tensor(value: object, name: str) -> Tensor:
    """A tensor of an array. The caller's tensor itself if it is one."""
    if isinstance(value, Tensor):
        return value
    try:
        if not isinstance(value, np.ndarray):
            raise TypeError("give an array")
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))  # a copy, of any strides
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor or a numpy array, not {type(value).__name__} ({error})") from None


def _check_values(images: Tensor) -> None:
    """InputError unless images on the CPU are finite and about in [0, 1], as resampling may overshoot.

    Values on a GPU are looked at with PAGE4D_DEBUG=1 alone, as that waits for the device.
    """
    if not images.numel() or not _checks.values_can_be_read(images):
        return
    least, most = (float(x) for x in torch.aminmax(images.detach()))  # NaN if any value is
    if not math.isfinite(least) or not math.isfinite(most):
        raise InputError(f"images must be finite, in [0, 1]: found values from {least:g} to {most:g}")
    if least < -RANGE_SLACK or most > 1 + RANGE_SLACK:
        advice = "divide them by 255" if least >= 0 and most <= 256 else "give them without mean and standard deviation applied"
        raise InputError(f"images must be in [0, 1], found values from {least:g} to {most:g}: {advice}")
