from __future__ import annotations

import copy
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from page4d import Page4D, preset

GOLDEN = Path(__file__).parent / "golden"


def golden_parameter(key: str, shape: torch.Size) -> torch.Tensor:
    """The weight that the golden outputs were made with: a pure function of its official name and shape.

    Uniform numbers seeded by the name (multiples of 2^-24, the same on every machine), scaled so that every path of the model moves the
    outputs: an all-default initialisation would hide most mistakes.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) * 1000003 % (2**63 - 1))
    unit = torch.rand(tuple(shape), generator=generator) * 2 - 1
    name = key.rsplit(".", 1)[-1]
    if name == "gamma":
        return 0.25 + 0.10 * unit
    if key.endswith("pose_branch.fc2.bias"):  # fields of view that survive the ReLU
        return torch.cat([0.2 * unit[:7], 0.6 + 0.1 * unit[7:]])
    if key.endswith("spatial_mask_head.head0.4.bias"):
        return 0.0 * unit - 0.05
    if key.endswith("updateformer.flow_head.bias"):  # tracks that move a pixel per iteration
        return torch.cat([unit[:2], 0.2 * unit[2:]])
    if name in {"camera_token", "register_token", "cls_token", "register_tokens", "mask_token", "query_ref_token", "virual_tracks"}:
        return unit
    if name in {"pos_embed", "empty_pose_tokens"}:
        return 0.5 * unit
    if len(shape) == 1:
        return 1.0 + 0.2 * unit if name == "weight" else 0.2 * unit
    transposed = "resize_layers.0." in key or "resize_layers.1." in key
    fan_in = shape[0] if transposed else math.prod(shape[1:])
    gain = 1.0
    if ".scratch." in key and len(shape) == 4:
        gain = 1.3
    if "output_conv2.2." in key:  # feeds an exponential
        gain = 0.15
    if "pose_branch.fc2" in key:
        gain = 0.5
    value = unit * (gain * math.sqrt(3.0 / fan_in))
    if key.endswith("spatial_mask_head.head0.4.weight"):
        value = 0.3 * (value - value.mean(dim=1, keepdim=True))
    if key.endswith("updateformer.flow_head.weight"):
        value[:2] *= 0.1
    if key.endswith("updateformer.input_transform.weight"):
        value[:, : (shape[1] - 4) // 3] *= 0.02
    return value


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = Page4D(preset("tiny")).state_dict()
    return {key: golden_parameter(key, value.shape) for key, value in shapes.items()}


@pytest.fixture(scope="module")
def model(golden_weights) -> Page4D:
    """The tiny preset with the golden weights, for tests that leave it as it is."""
    model = Page4D(preset("tiny")).eval()
    model.load_state_dict(golden_weights)
    return model


@pytest.fixture
def tiny(model) -> Page4D:
    """The same, for one test alone."""
    return copy.deepcopy(model)


class GoldenCase(NamedTuple):
    name: str
    arrays: dict[str, np.ndarray]
    noise: dict[str, float]

    @property
    def mask_strength(self) -> float:
        return 0.0 if self.name.startswith("nomask") else 64.0

    def tensor(self, name: str) -> torch.Tensor | None:
        return torch.from_numpy(self.arrays[name]) if name in self.arrays else None


@pytest.fixture(params=["mask_84x126_s3", "mask_140x154_s2", "nomask_84x126_s3"])
def golden_case(request) -> GoldenCase:
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        arrays = {name: file[name] for name in file.files if not name.startswith("noise/")}
        noise = {name.removeprefix("noise/"): float(file[name]) for name in file.files if name.startswith("noise/")}
    return GoldenCase(request.param, arrays, noise)
