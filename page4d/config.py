"""Model configuration: frozen dataclasses and presets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import ConfigError


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


DENSE, FRAME = "dense", "frame"
LARGEST_CELL = 100  # rows and columns
Layer = str | tuple[int, int]  # how patches attend in a global layer: "dense", "frame", or the rows and columns of a cell


def checked_layers(layers: Iterable[Any]) -> tuple[Layer, ...]:
    """The layers of an attention plan as tuples. ConfigError unless each is "dense", "frame" or (rows, columns) of a cell."""
    layers = tuple(tuple(layer) if isinstance(layer, list) else layer for layer in layers)
    for number, layer in enumerate(layers):
        cell = isinstance(layer, tuple) and len(layer) == 2 and all(type(x) is int and 1 <= x <= LARGEST_CELL for x in layer)
        wrong = f"layer {number} of an attention plan cannot be {_short(layer)}: give 'dense', 'frame' or a cell such as [2, 2]"
        _expect(layer in (DENSE, FRAME) or cell, wrong)
    return layers


@dataclass(frozen=True)
class PlansConfig:
    """The model's own attention plans: a `Layer` for each global layer. None: the general one, see docs/attention_plans.md."""

    balanced: tuple[Layer, ...] | None = None
    fast: tuple[Layer, ...] | None = None

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            layers = getattr(self, entry.name)
            if layers is not None:
                _expect(isinstance(layers, (tuple, list)), f"plans.{entry.name} must be a list of layers, not {_short(layers)}")
                object.__setattr__(self, entry.name, checked_layers(layers))


@dataclass(frozen=True)
class EncoderConfig:
    """The DINOv2-style vision transformer that computes the patch tokens."""

    depth: int = 24
    num_heads: int = 16
    position_grid: int = 37  # side of the square grid of learned position embeddings: 518 / 14


@dataclass(frozen=True)
class CameraHeadConfig:
    """The transformer that refines the pose encoding `iterations` times."""

    depth: int = 4
    num_heads: int = 16
    iterations: int = 4


@dataclass(frozen=True)
class DenseHeadConfig:
    """A DPT head with one level per kept layer."""

    features: int = 256
    out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)


@dataclass(frozen=True)
class TrackHeadConfig:
    """The tracker: a DPT feature map, correlation on `levels` levels, and a transformer that refines tracks `iterations` times."""

    features: int = 128  # channels of the feature map and of a track's feature
    out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    hidden: int = 384
    num_heads: int = 8
    depth: int = 6
    virtual_tracks: int = 64
    iterations: int = 4
    levels: int = 7
    radius: int = 4


@dataclass(frozen=True)
class Page4DConfig:
    """A PAGE-4D (or VGGT) model. A head that is None does not exist, a mask_hidden of None means no mask head.

    `masked_blocks` is the half-open range of global blocks whose attention the mask modulates; the mask head reads the tokens after
    frame block `mask_after`; `kept_layers` are the four rounds whose outputs the heads read, the last one also by the camera head.
    """

    embed_dim: int = 1024
    num_heads: int = 16
    depth: int = 24
    mlp_ratio: int = 4
    patch_size: int = 14
    image_size: tuple[int, int] | None = None  # (height, width) of the images of all training, if one: what programs then use
    register_tokens: int = 4
    rope_base: float = 100.0
    layer_scale: float = 0.01  # initial value; the released weights were trained from this one
    masked_blocks: tuple[int, int] = (10, 20)
    mask_after: int = 9
    mask_hidden: int | None = 256
    mask_strength: float = 64.0  # gate of the special tokens when the caller names none; 0 = no modulation
    kept_layers: tuple[int, int, int, int] = (4, 11, 17, 23)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    camera: CameraHeadConfig | None = field(default_factory=CameraHeadConfig)
    depth_head: DenseHeadConfig | None = field(default_factory=DenseHeadConfig)
    point_head: DenseHeadConfig | None = field(default_factory=DenseHeadConfig)
    track: TrackHeadConfig | None = field(default_factory=TrackHeadConfig)
    plans: PlansConfig = field(default_factory=PlansConfig)
    chunk: tuple[int, int, int] | None = None  # measured: from this length on, chunks of so many frames with this overlap are better

    @property
    def special_tokens(self) -> int:
        """Camera token and registers, before the patches of each frame."""
        return 1 + self.register_tokens

    def __post_init__(self) -> None:
        for name, kind in _NESTED.items():
            value = getattr(self, name)
            _expect(
                isinstance(value, kind) or (value is None and name not in ("encoder", "plans")),
                f"{name} must be of type {kind.__name__}, not {_short(value)}",
            )
        _check_numbers(self, "")
        for name, heads in (("num_heads", self.num_heads), ("encoder.num_heads", self.encoder.num_heads)):
            _expect(self.embed_dim % heads == 0, f"embed_dim {self.embed_dim} is not a multiple of {name} {heads}")
        head_dim = self.embed_dim // self.num_heads
        _expect(head_dim % 4 == 0, f"the head dim {head_dim} must be a multiple of 4 for 2-D RoPE")
        first, end = self.masked_blocks
        _expect(0 <= first <= end <= self.depth, f"masked_blocks {self.masked_blocks} must be a range within the {self.depth} blocks")
        late = f"the mask head reads after frame block {self.mask_after}, too late for global block {first}"
        _expect(first == end or self.mask_after <= first, late)
        blind = f"mask_strength {self.mask_strength} has no effect, as masked_blocks {self.masked_blocks} is empty: use 0"
        _expect(self.mask_strength == 0 or first < end, blind)
        ordered = sorted(set(self.kept_layers)) == list(self.kept_layers) and len(self.kept_layers) == 4
        _expect(ordered and self.kept_layers[0] >= 0, f"kept_layers {self.kept_layers} must be four ascending layers")
        _expect(self.kept_layers[-1] < self.depth, f"kept_layers {self.kept_layers} reaches past the {self.depth} layers")
        needless = f"mask_strength {self.mask_strength} needs a mask head, but mask_hidden is None: use 0"
        _expect(self.mask_strength == 0 or self.mask_hidden is not None, needless)
        unread = f"the mask head reads after frame block {self.mask_after}, but no layer past {self.kept_layers[-1]} is run"
        _expect(self.mask_hidden is None or self.mask_after <= self.kept_layers[-1], unread)
        if self.chunk is not None:
            longest, size, overlap = self.chunk
            _expect(longest > size > overlap, f"chunk {self.chunk} must be a length, a shorter chunk and a shorter overlap")
        for name, layers in vars(self.plans).items():
            wrong = f"plans.{name} has {len(layers or ())} layers instead of {self.depth}"
            _expect(layers is None or len(layers) == self.depth, wrong)
        if self.camera is not None:
            _expect(
                2 * self.embed_dim % self.camera.num_heads == 0, f"camera.num_heads {self.camera.num_heads} does not divide 2 embed_dim"
            )
        for name, head in (("depth_head", self.depth_head), ("point_head", self.point_head), ("track", self.track)):
            if head is not None:
                fits = all(channels % 4 == 0 for channels in (*head.out_channels, head.features // 2))
                _expect(fits, f"{name}: out_channels and features / 2 must be multiples of 4 for the position embedding")
        if self.track is not None:
            _expect(self.track.hidden % self.track.num_heads == 0, f"track.hidden {self.track.hidden} is not a multiple of its heads")

    def replace(self, **changes: Any) -> Page4DConfig:
        """With other values. Another depth has no plans and no measured chunks of its own, unless they are given."""
        if changes.get("depth", self.depth) != self.depth:
            changes = {"plans": PlansConfig(), "chunk": None, **changes}
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Page4DConfig:
        try:
            return _from_dict(cls, json.loads(text))
        except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
            raise ConfigError(f"not a model configuration: {error}") from None


MOST_LAYERS, MOST, MOST_REAL = 1000, 1 << 16, 1e9  # of depths, iterations and levels; of other whole numbers; of fractions
LAYERS = ("depth", "iterations", "levels", "masked_blocks", "mask_after", "kept_layers", "radius")

FROM_ZERO = (
    "register_tokens",
    "masked_blocks",
    "mask_after",
    "mask_strength",
    "kept_layers",
    "radius",
)  # may be 0; all other numbers are positive


def _check_numbers(config: Any, prefix: str) -> None:
    """Raise ConfigError unless every field, also nested ones, is a number of its type and in range, or None where that is allowed."""
    for entry in dataclasses.fields(config):
        name, value = prefix + entry.name, getattr(config, entry.name)
        if isinstance(value, PlansConfig):
            continue  # it has checked itself
        if dataclasses.is_dataclass(value):
            _check_numbers(value, f"{name}.")
            continue
        if value is None and "None" in entry.type:
            continue
        number = float if entry.type == "float" else int
        values: tuple[Any, ...] = (value,)
        if entry.type.startswith("tuple"):
            length = entry.type.split("]")[0].count(",") + 1
            wanted_tuple = "(height, width)" if entry.name == "image_size" else f"{length} whole numbers"
            _expect(isinstance(value, tuple) and len(value) == length, f"{name} must be {wanted_tuple}, not {_short(value)}")
            values = value
        wanted = "a finite number" if number is float else "a whole number"
        for x in values:
            typed = isinstance(x, int) or (number is float and isinstance(x, float) and math.isfinite(x))
            _expect(typed and not isinstance(x, bool), f"{name} must be {wanted}, not {_short(value)}")
            least = 0 if entry.name in FROM_ZERO else 1 if number is int else 1e-9
            _expect(x >= least, f"{name} must be {'at least 0' if least == 0 else 'positive'}, not {_short(value)}")
            most = MOST_REAL if number is float else MOST_LAYERS if entry.name in LAYERS else MOST
            _expect(x <= most, f"{name} must be at most {most:g}, not {_short(value)}")
        if number is float:
            object.__setattr__(config, entry.name, float(value))  # JSON writes 1.0 as 1


def _short(value: object) -> str:
    """The value, abbreviated. The largest whole numbers cannot be printed at all."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) < 60 else f"{text[:30]}..."


_NESTED = {
    "encoder": EncoderConfig,
    "camera": CameraHeadConfig,
    "depth_head": DenseHeadConfig,
    "point_head": DenseHeadConfig,
    "track": TrackHeadConfig,
    "plans": PlansConfig,
}


def _from_dict(cls: type, values: dict[str, Any]) -> Any:
    def convert(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(tuple(x) if isinstance(x, list) else x for x in value)
        return _from_dict(_NESTED[name], value) if isinstance(value, dict) else value

    return cls(**{name: convert(name, value) for name, value in values.items()})


def _nano() -> Page4DConfig:
    """Small enough to train on a CPU and to ship with the source. It is for small images, so its patches are small.

    It has no point head: depth and cameras give points.
    """
    return Page4DConfig(
        patch_size=7,
        image_size=(56, 84),
        embed_dim=128,
        num_heads=2,
        depth=6,
        layer_scale=1.0,
        masked_blocks=(2, 5),
        mask_after=2,
        mask_hidden=64,
        kept_layers=(1, 2, 4, 5),
        encoder=EncoderConfig(depth=2, num_heads=2, position_grid=16),
        camera=CameraHeadConfig(depth=1, num_heads=4),
        depth_head=DenseHeadConfig(features=32, out_channels=(32, 64, 96, 96)),
        point_head=None,
        track=None,
        plans=PlansConfig(  # docs/attention_plans.md has why
            balanced=((2, 2), (2, 2), (3, 3), (2, 2), (3, 3), FRAME),
            fast=((2, 3), (3, 3), (4, 4), (2, 3), (4, 4), FRAME),
        ),
        chunk=(128, 24, 6),  # docs/long_video.md has why
    )


def _small() -> Page4DConfig:
    """A quarter of the width and half of the depth. Runs in seconds on a CPU, and has no released weights."""
    dense = DenseHeadConfig(features=64, out_channels=(48, 96, 192, 192))
    return Page4DConfig(
        embed_dim=256,
        num_heads=4,
        depth=12,
        masked_blocks=(5, 10),
        mask_after=4,
        mask_hidden=64,
        kept_layers=(2, 5, 8, 11),
        encoder=EncoderConfig(depth=6, num_heads=4),
        camera=CameraHeadConfig(depth=2, num_heads=8),
        depth_head=dense,
        point_head=dense,
        track=TrackHeadConfig(features=64, out_channels=dense.out_channels, hidden=128, depth=3),
    )


def _tiny() -> Page4DConfig:
    """All 24 layers at width 128, for tests."""
    dense = DenseHeadConfig(features=32, out_channels=(24, 32, 48, 64))
    return Page4DConfig(
        embed_dim=128,
        num_heads=2,
        encoder=EncoderConfig(depth=3, num_heads=2),
        camera=CameraHeadConfig(depth=2, num_heads=4),
        depth_head=dense,
        point_head=dense,
        track=TrackHeadConfig(features=32, out_channels=dense.out_channels, hidden=64),
    )


PRESETS: dict[str, Page4DConfig] = {
    "page4d": Page4DConfig(mask_strength=0.0),  # checkpoint_nomask: the mask was only used in training
    "page4d-mask": Page4DConfig(),
    "vggt": Page4DConfig(mask_hidden=None, mask_strength=0.0),
    "nano": _nano(),
    "small": _small(),
    "tiny": _tiny(),
}


def preset(name: str) -> Page4DConfig:
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
