"""Point tracks: a feature map per frame, correlation with each query's feature, and an iterated transformer update."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...config import TrackHeadConfig
from ...execution.across import Across
from ...execution.memory import HEAD_FRAMES, SAMPLES_IN_FLIGHT
from ...layers import LayerNorm, Linear, Mlp, cache_tensors
from .dense import DensePredictor, map_frames

STRIDE = 2  # image pixels per feature-map pixel
FLOW_SCALE = 518  # the input width the released weights were trained at


def _sample(maps: Tensor, points: Tensor, padding: str) -> Tensor:
    """Bilinear samples (N, C, *points.shape[1:3]) of maps (N, C, h, w) at pixel positions (N, a, b, 2), x first."""
    x, y = points.unbind(-1)
    grid = torch.stack([2 * x / max(maps.shape[-1] - 1, 1) - 1, 2 * y / max(maps.shape[-2] - 1, 1) - 1], -1)
    return F.grid_sample(maps, grid, padding_mode=padding, align_corners=True)


@cache_tensors
def _sincos(channels: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[sin, cos] of 0 .. length - 1 at frequencies 10000^(-2m / channels), (length, channels), evaluated in fp64, rounded to fp32."""
    frequencies = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).float().to(device, dtype)


def _sincos_at(points: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """The map [sin x, cos x, sin y, cos y] of `channels` over a (h, w) grid, sampled bilinearly (clamped at the border) at points (..., 2).

    The map is separable, so each axis is interpolated between two rows of a table of its own.
    """
    sampled = []
    for axis, length in ((0, size[1]), (1, size[0])):
        table = _sincos(channels // 2, length, points.device, points.dtype)
        position = points[..., axis].clamp(0, length - 1)
        low = position.floor().long().clamp(0, length - 2)
        sampled.append(torch.lerp(table[low], table[low + 1], (position - low).unsqueeze(-1)))
    return torch.cat(sampled, -1)


def _flow_embedding(flow: Tensor, channels: int) -> Tensor:
    """[sin, cos] interleaved of each component of flow (..., 2) at linear frequencies, `channels` per component."""
    step = 2 * 1000 / channels
    frequencies = torch.arange(channels // 2, dtype=flow.dtype, device=flow.device) * step
    angles = flow[..., None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


class MultiheadAttention(nn.Module):
    """torch's MultiheadAttention by parameter names. Runs SDPA, as torch's inference path holds all heads * N^2 probabilities."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries x (B, N, C), keys and values context (B, M, C)."""
        projections = zip((x, context, context), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (rearrange(F.linear(y, w, b), "b n (h d) -> b h n d", h=self.num_heads) for y, w, b in projections)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class TrackerBlock(nn.Module):
    """The skip connection carries the normalised input, as in the released weights: x = LN(x); x += attention(x, context); x += mlp(LN(x)).

    Self-attention keeps its parameters under `attn`, cross-attention under `cross_attn` beside `norm_context`.
    """

    def __init__(self, dim: int, num_heads: int, cross: bool):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.norm_context = LayerNorm(dim) if cross else None
        self.norm2 = LayerNorm(dim)
        self.add_module("cross_attn" if cross else "attn", MultiheadAttention(dim, num_heads))
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norm1(x)
        if self.norm_context is None or context is None:
            attention, context = self.get_submodule("attn"), x
        else:
            attention, context = self.get_submodule("cross_attn"), self.norm_context(context)
        x = x + attention(x, context)
        return x + self.mlp(self.norm2(x))


class UpdateFormer(nn.Module):
    """Attention over time for every track, then among tracks of a frame through a few virtual ones."""

    def __init__(self, inputs: int, outputs: int, config: TrackHeadConfig):
        super().__init__()
        hidden = config.hidden

        def blocks(cross: bool) -> nn.ModuleList:
            return nn.ModuleList(TrackerBlock(hidden, config.num_heads, cross) for _ in range(config.depth))

        self.virual_tracks = nn.Parameter(torch.randn(1, config.virtual_tracks, 1, hidden))  # spelled this way in the released state dict
        self.input_norm = LayerNorm(inputs)
        self.input_transform = Linear(inputs, hidden)
        self.output_norm = LayerNorm(hidden)
        self.flow_head = Linear(hidden, outputs)
        self.time_blocks = blocks(cross=False)
        self.space_virtual_blocks = blocks(cross=False)
        self.space_point2virtual_blocks = blocks(cross=True)
        self.space_virtual2point_blocks = blocks(cross=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.flow_head.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, S, inputs) -> (B, N, S, outputs)."""
        batch, points, frames, _ = x.shape
        first = self.input_transform(self.input_norm(x))
        z = torch.cat([first, self.virual_tracks.expand(batch, -1, frames, -1)], 1)
        groups = zip(
            self.time_blocks, self.space_virtual2point_blocks, self.space_virtual_blocks, self.space_point2virtual_blocks, strict=True
        )
        for time, to_virtual, among_virtual, to_points in groups:
            z = time(rearrange(z, "b n s c -> (b n) s c"))
            per_frame = rearrange(z, "(b n) s c -> (b s) n c", b=batch)
            real, virtual = per_frame[:, :points], per_frame[:, points:]
            virtual = among_virtual(to_virtual(virtual, real))
            real = to_points(real, virtual)
            z = rearrange(torch.cat([real, virtual], 1), "(b s) n c -> b n s c", b=batch)
        return self.flow_head(self.output_norm(z[:, :points] + first))


class Tracker(nn.Module):
    def __init__(self, config: TrackHeadConfig):
        super().__init__()
        self.config = config
        latent = config.features
        self.inputs = 3 * latent + 4
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, self.inputs))  # [first frame, every other frame]
        self.updateformer = UpdateFormer(self.inputs, latent + 2, config)
        self.corr_mlp = Mlp(config.levels * (2 * config.radius + 1) ** 2, config.hidden, latent)
        self.fmap_norm = LayerNorm(latent)
        self.ffeat_norm = LayerNorm(latent)
        self.ffeat_updater = nn.Sequential(Linear(latent, latent), nn.GELU())
        self.vis_predictor = nn.Sequential(Linear(latent, 1))
        self.conf_predictor = nn.Sequential(Linear(latent, 1))

    def _correlation(self, pyramid: list[Tensor], features: Tensor, positions: Tensor) -> Tensor:
        """Dot products of each track's feature (B, S, N, L) with the map around its position (B, S, N, 2), all levels: (B, S, N, 567).

        The released model correlates with the whole map and samples the result. Sampling the map first gives the same, as both are
        linear, and needs memory for the windows only. Within a window the x offset is the slow index.
        """
        batch, frames, points, latent = features.shape
        radius = self.config.radius
        offset = torch.arange(-radius, radius + 1, device=features.device, dtype=positions.dtype)
        window = torch.stack(torch.meshgrid(offset, offset, indexing="ij"), -1).view(1, 1, -1, 2)
        features, positions = features.flatten(0, 1), positions.flatten(0, 1)
        step = max(1, SAMPLES_IN_FLIGHT // (points * window.shape[2] * latent))
        levels = []
        for level, maps in enumerate(pyramid):
            around = positions.unsqueeze(2) / 2**level + window
            chunks = []
            for f, m, p in zip(features.split(step), maps.split(step), around.split(step), strict=True):
                chunks.append(torch.einsum("snl,slnw->snw", f, _sample(m, p, "zeros")) / math.sqrt(latent))
            levels.append(torch.cat(chunks))
        return torch.cat(levels, -1).unflatten(0, (batch, frames))

    def forward(self, maps: Tensor, query_points: Tensor, across: Across | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Feature maps (B, S, L, h, w), normalised over L by `fmap_norm`, query points (B, N, 2) in pixels of frame 0.

        `across`: the sequence of which the maps are a part. Each rank correlates with its own maps and computes all tracks from these.

        Returns tracks of all iterations (iterations, B, S, N, 2) in image pixels, visibility and confidence (B, S, N).
        """
        frames, latent, height, width = maps.shape[1:]
        query = query_points / STRIDE
        features = _sample(maps[:, 0], query.unsqueeze(2), "border").squeeze(3).transpose(1, 2)  # (B, N, L)
        own = slice(0, frames)
        if across is not None:
            features = across.from_first(features, "tracks")
            frames, own = across.total, across.own
        features = features.unsqueeze(1).expand(-1, frames, -1, -1)  # (B, S, N, L)
        positions = query.unsqueeze(1).expand(-1, frames, -1, -1)
        pyramid = [maps.flatten(0, 1)]
        for _ in range(self.config.levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))

        first, rest = self.query_ref_token.unsqueeze(2).split(1, 1)
        reference = torch.cat([first, rest.expand(-1, frames - 1, -1, -1)], 1)  # (1, S, 1, inputs)
        constant = _sincos_at(query, self.inputs, (height, width)).unsqueeze(1) + reference
        tracks = []
        for _ in range(self.config.iterations):
            positions = positions.detach()
            correlation = self.corr_mlp(self._correlation(pyramid, features[:, own], positions[:, own]))
            correlation = correlation if across is None else across.gather(correlation, "tracks")
            flow = positions - positions[:, :1]
            scaled = flow / FLOW_SCALE
            x = torch.cat([_flow_embedding(flow, latent // 2), scaled, scaled, correlation, features], -1) + constant
            delta = self.updateformer(x.transpose(1, 2)).transpose(1, 2)
            features = features + self.ffeat_updater(self.ffeat_norm(delta[..., 2:]))
            moved = positions + delta[..., :2]
            positions = torch.cat([query.unsqueeze(1), moved[:, 1:]], 1)  # the query point is fixed
            tracks.append(STRIDE * positions)
        visibility, confidence = (torch.sigmoid(head(features)).squeeze(-1) for head in (self.vis_predictor, self.conf_predictor))
        return torch.stack(tracks), visibility, confidence


class TrackHead(nn.Module):
    def __init__(self, dim: int, patch_size: int, config: TrackHeadConfig):
        super().__init__()
        self.feature_extractor = DensePredictor(dim, patch_size, config.out_channels, config.features, config.features, positions=False)
        self.tracker = Tracker(config)
        coarsest = STRIDE * 2 ** (config.levels - 1)  # image pixels per pixel of the coarsest map
        self.smallest_image = -(-coarsest // patch_size) * patch_size

    def forward(
        self,
        layers: list[Tensor],
        special_tokens: int,
        image_size: tuple[int, int],
        query_points: Tensor,
        frames: int = HEAD_FRAMES,
        across: Across | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Tracker.forward`; layers as for the dense heads, images of at least `smallest_image` pixels a side."""
        size = (image_size[0] // STRIDE, image_size[1] // STRIDE)
        extract = self.feature_extractor
        shape = layers[0].shape[:2]

        def normalised(chunk: slice) -> tuple[Tensor]:
            maps = extract.features(extract.chunk(layers, chunk), special_tokens, image_size, size)
            return (rearrange(self.tracker.fmap_norm(rearrange(maps, "n c h w -> n h w c")), "n h w c -> n c h w"),)

        (maps,) = map_frames(shape.numel(), frames, normalised, lambda index, shape, like: like.new_empty(shape))
        tracks, visibility, confidence = self.tracker(maps.unflatten(0, shape), query_points, across)
        if across is None:
            return tracks, visibility, confidence
        return tracks[:, :, across.own], visibility[:, across.own], confidence[:, across.own]
