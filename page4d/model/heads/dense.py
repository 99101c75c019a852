"""Dense prediction (DPT): four token levels fused into one feature map, and the depth and point heads on it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...execution.memory import HEAD_FRAMES, for_each_chunk
from ...files import Allocate
from ...layers import Conv2d, LayerNorm, cache_tensors

log = logging.getLogger(__name__)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


@cache_tensors
def _sincos(channels: int, length: int, extent: float, device: torch.device) -> Tensor:
    """[sin, cos] of `length` points across +-extent at channels / 2 frequencies: (channels, length) fp32, computed in fp64."""
    reach = extent * (length - 1) / length
    points = torch.linspace(-reach, reach, length, dtype=torch.float32).double()
    frequencies = 100.0 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    angles = frequencies[:, None] * points[None, :]
    return torch.cat([angles.sin(), angles.cos()]).float().to(device)


def add_positions(x: Tensor, aspect: float) -> Tensor:
    """Add 0.1 times the sincos embedding to x (N, C, h, w), in place. Half of the channels encode the column, the rest the row.

    `aspect` is W / H of the image. Positions are scaled so that the image diagonal is 2.
    """
    channels, (height, width) = x.shape[1] // 2, x.shape[2:]
    diagonal = math.sqrt(aspect * aspect + 1)
    columns = 0.1 * _sincos(channels, width, aspect / diagonal, x.device)
    rows = 0.1 * _sincos(channels, height, 1 / diagonal, x.device)
    x[:, :channels] += columns[:, None, :]
    x[:, channels:] += rows[:, :, None]
    return x


class ResidualConvUnit(nn.Module):
    """conv2(relu(conv1(relu x))) + relu(x). The skip carries relu(x): the released weights were trained with an in-place ReLU."""

    def __init__(self, features: int):
        super().__init__()
        self.conv1 = Conv2d(features, features, 3, padding=1)
        self.conv2 = Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.conv2(F.relu(self.conv1(x))) + x


class FusionBlock(nn.Module):
    """Add a level to the coarser result, refine, project and upsample. The coarsest block has no coarser result."""

    def __init__(self, features: int, coarsest: bool):
        super().__init__()
        self.out_conv = Conv2d(features, features, 1)
        self.resConfUnit1 = None if coarsest else ResidualConvUnit(features)
        self.resConfUnit2 = ResidualConvUnit(features)

    def forward(self, coarser: Tensor | None, level: Tensor, size: tuple[int, int]) -> Tensor:
        if self.resConfUnit1 is not None and coarser is not None:
            level = coarser + self.resConfUnit1(level)
        # a 1x1 convolution commutes with bilinear upsampling and is cheaper before it
        return upsample(self.out_conv(self.resConfUnit2(level)), size)


class Scratch(nn.Module):
    """Projects the levels to one width and fuses them. The name is that of the released state dict."""

    def __init__(self, out_channels: tuple[int, ...], features: int, output_features: int):
        super().__init__()
        for level, channels in enumerate(out_channels, 1):
            self.add_module(f"layer{level}_rn", Conv2d(channels, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", FusionBlock(features, coarsest=level == len(out_channels)))
        self.output_conv1 = Conv2d(features, output_features, 3, padding=1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Levels from fine to coarse -> (N, output_features, 2 x the finest level's size)."""
        levels = [self.get_submodule(f"layer{i}_rn")(level) for i, level in enumerate(levels, 1)]
        height, width = levels[0].shape[-2:]
        sizes = [(2 * height, 2 * width), *((level.shape[-2], level.shape[-1]) for level in levels)]
        fused = None
        for i in range(len(levels), 0, -1):
            fused = self.get_submodule(f"refinenet{i}")(fused, levels[i - 1], sizes[i - 1])
        return self.output_conv1(fused)


class DensePredictor(nn.Module):
    """Four levels of tokens (B, S, P, 2, C) -> a feature map. Base of the dense heads and the tracker's feature extractor."""

    def __init__(
        self, dim: int, patch_size: int, out_channels: tuple[int, int, int, int], features: int, output_features: int, positions: bool
    ):
        super().__init__()
        self.patch_size, self.positions = patch_size, positions
        self.norm = LayerNorm(dim)
        self.projects = nn.ModuleList(Conv2d(dim, channels, 1) for channels in out_channels)
        first, second, _, fourth = out_channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                Conv2d(fourth, fourth, 3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(out_channels, features, output_features)

    def features(self, layers: list[Tensor], special_tokens: int, image_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
        """(N, output_features, *out_size) of tokens (N, P, 2C) each."""
        height, width = image_size
        grid = (height // self.patch_size, width // self.patch_size)
        levels = []
        for tokens, project, resize in zip(layers, self.projects, self.resize_layers, strict=True):
            x = rearrange(self.norm(tokens[:, special_tokens:]), "n (h w) c -> n c h w", h=grid[0])
            x = project(x)
            levels.append(resize(add_positions(x, width / height) if self.positions else x))
        x = upsample(self.scratch(levels), out_size)
        return add_positions(x, width / height) if self.positions else x

    def chunk(self, layers: list[Tensor], frames: slice) -> list[Tensor]:
        """Frames of the layers (B, S, P, 2, C) as (n, P, 2C) on the head's device."""
        device = self.norm.weight.device
        flat = [rearrange(layer, "b s p half c -> (b s) p half c")[frames] for layer in layers]
        return [torch.cat([half.to(device, non_blocking=True) for half in layer.unbind(-2)], -1) for layer in flat]


def map_frames(total: int, chunk: int, compute: Callable[[slice], tuple[Tensor, ...]], allocate: Callable[..., Tensor]) -> list[Tensor]:
    """Apply `compute` to slices of `chunk` frames and join each of its results over all `total` frames.

    Without gradients every chunk is written to its place in `allocate(index, shape, like)`. A chunk that runs out of memory is retried
    with half as many frames.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        chunks = [compute(slice(first, min(first + chunk, total))) for first in range(0, total, chunk)]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    results: list[Tensor] = []

    def step(frames: slice) -> None:
        parts = compute(frames)
        if not results:
            results.extend([allocate(i, (total, *part.shape[1:]), part) for i, part in enumerate(parts)])
        for whole, part in zip(results, parts, strict=True):
            whole[frames] = part

    def on_oom(frames: int) -> int:
        log.warning("out of memory in spite of the plan: going on with %d frames at a time in this head", frames // 2)
        return frames // 2

    for_each_chunk(total, chunk, step, on_oom)
    return results


class DenseHead(DensePredictor):
    """A dense map with confidence 1 + exp(.): "depth" = exp(.) in 1 channel, "points" = sign(.) expm1(|.|) in 3."""

    def __init__(self, dim: int, patch_size: int, out_channels: tuple[int, int, int, int], features: int, kind: str):
        super().__init__(dim, patch_size, out_channels, features, features // 2, positions=True)
        self.kind = kind
        channels = {"depth": 2, "points": 4}[kind]
        predict = nn.Sequential(Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), Conv2d(32, channels, 1))
        self.scratch.add_module("output_conv2", predict)

    @property
    def results(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names of the map and its confidence, with their dimensions after frames, height and width."""
        return [("depth", (1,)), ("depth_conf", ())] if self.kind == "depth" else [("world_points", (3,)), ("world_points_conf", ())]

    def forward(self, layers: list[Tensor], special_tokens: int, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tokens (n, P, 2C) of each of the four layers -> map (n, H, W, 1 or 3), confidence (n, H, W)."""
        features = self.features(layers, special_tokens, image_size, image_size)
        x = self.scratch.get_submodule("output_conv2")(features).permute(0, 2, 3, 1)
        value, confidence = x[..., :-1], x[..., -1]
        return value.exp() if self.kind == "depth" else value.sign() * value.abs().expm1(), 1 + confidence.exp()

    def forward_chunked(
        self,
        layers: list[Tensor],
        special_tokens: int,
        image_size: tuple[int, int],
        frames: int = HEAD_FRAMES,
        allocate: Allocate | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the four kept layers (B, S, P, 2, C) -> map (B, S, H, W, 1 or 3), confidence (B, S, H, W).

        Runs `frames` frames at a time. Without gradients each chunk is written to its place in what `allocate` returned.
        """
        batch, count = layers[0].shape[:2]

        def make(index: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
            return allocate(self.results[index][0], shape) if allocate else like.new_empty(shape)

        found = map_frames(batch * count, frames, lambda chunk: self(self.chunk(layers, chunk), special_tokens, image_size), make)
        return found[0].unflatten(0, (batch, count)), found[1].unflatten(0, (batch, count))
