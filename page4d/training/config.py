"""The configuration of a run: one YAML file. KEY=VALUE on the command line overrides a key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ..config import preset
from ..data.preprocess import PATCH
from ..data.synthetic import KINDS
from ..errors import ConfigError, InputError
from ..execution.attention_plan import AttentionPlan

HEADS = ("camera", "depth", "points", "track", "mask")  # the heads that have a loss


@dataclass(frozen=True)
class DataConfig:
    """Synthetic scenes. Every step draws a number of frames. The batch then holds as many sequences as fit in `images`."""

    kind: str = "static"  # static, dynamic or mixed
    seed: int = 1
    frames: tuple[int, int] = (2, 8)  # minimum and maximum number of frames of a sequence
    images: int = 16  # maximum number of images of a micro-batch on one device
    size: tuple[int, int] = (112, 154)  # height, width
    supersample: int = 1  # rays along each side of a pixel
    noise: float = 0.01  # standard deviation of the noise added to images in [0, 1]
    jitter: float = 0.9  # probability of colour jitter
    photographs: str | None = None  # a folder of images to use as textures
    workers: int = 0  # processes that render; 0 = render in the training process


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms. A weight of 0 leaves out the term and its head."""

    camera: float = 5.0
    depth: float = 1.0
    points: float = 0.0
    track: float = 0.0
    mask: float = 0.0  # supervise the mask with the true motion
    match: float = 0.0  # supervise attention and tokens with true correspondences, for training from scratch


@dataclass(frozen=True)
class OptimizerConfig:
    """Each learning rate rises linearly over its warm-up (a fraction of all steps), then falls to `floor` along a half cosine."""

    kind: str = "adamw"  # or muon: Muon for the weight matrices of transformer blocks, AdamW for the rest
    lr: float = 1e-5
    warmup: float = 0.05
    weight_decay: float = 0.01
    mask_lr: float = 2e-5  # of the mask head
    mask_warmup: float = 0.15
    mask_weight_decay: float = 0.02
    floor: float = 1e-8
    clip: float = 1.0  # maximum norm of the gradient of all trained parameters together


@dataclass(frozen=True)
class MaskConfig:
    """Mask strength by step: `strength` before `hold_start`, 0 from `hold_end` on, a half cosine in between (fractions of all steps)."""

    strength: float = 64.0
    hold_start: float = 1.0
    hold_end: float = 1.0


@dataclass(frozen=True)
class RunConfig:
    """A training run. The YAML file has a key per field, and a group of keys for each of data, loss, optimizer and mask.

    Raises:
        ConfigError: a value is out of range or contradicts another.
    """

    model: str = "nano"  # a preset
    weights: str | None = None  # initial weights: nano, a hub name or a file that fits the preset; None = random
    trainable: str = "middle"  # middle = masked blocks and mask head, as in the paper; dense = depth and point heads; or all
    steps: int = 1000
    accumulation: int = 1  # micro-batches per step
    seed: int = 0  # of the random initial weights
    precision: str = "fp32"  # or bf16, by autocast
    attention: str = "exact"  # or balanced, fast or a .json file: what the patches of each global layer see
    average: float = 0.0  # save a running mean of the weights with this decay per step; 0 = save the last weights
    checkpoint_activations: bool = False
    context: int = 1  # processes that share each sequence, by its frames; the number of processes is a multiple of it
    log_every: int = 10
    save_every: int = 500
    out: str = "runs/run"
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        def expect(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigError(message)

        expect(self.trainable in ("all", "middle", "dense"), f"trainable: {self.trainable!r} must be all, middle or dense")
        expect(self.precision in ("fp32", "bf16"), f"precision: {self.precision!r} must be fp32 or bf16")
        self._check_attention()
        kind = self.optimizer.kind
        expect(kind in ("adamw", "muon"), f"optimizer.kind: {kind!r} must be adamw or muon")
        expect(0 <= self.average < 1, f"average: {self.average} must be at least 0 and less than 1")
        values = flatten(self.to_dict())
        for name in ("steps", "accumulation", "log_every", "save_every", "data.supersample", "context"):
            expect(values[name] >= 1, f"{name}: {values[name]} must be at least 1")
        for name in ("seed", "data.seed"):
            expect(0 <= values[name] < 1 << 32, f"{name}: {values[name]} must be at least 0 and less than 2^32")
        for name in ("data.noise", "data.jitter", "optimizer.warmup", "optimizer.mask_warmup"):
            expect(0 <= values[name] <= 1, f"{name}: {values[name]} must be between 0 and 1")
        expect(self.data.kind in KINDS, f"data.kind: {self.data.kind!r} must be one of {', '.join(KINDS)}")
        expect(self.data.workers >= 0, f"data.workers: {self.data.workers} must be at least 0")
        fits = all(side >= PATCH and side % PATCH == 0 for side in self.data.size)
        expect(fits, f"data.size: {self.data.size} must be [height, width] in multiples of {PATCH}")
        least, most = self.data.frames
        expect(1 <= least <= most, f"data.frames: {self.data.frames} must be [minimum, maximum] with 1 <= minimum <= maximum")
        expect(least >= self.context, f"data.frames: {least} frames are too few for a context of {self.context} processes")
        expect(self.context == 1 or not self.loss.match, "loss.match needs whole sequences: set it to 0, or context to 1")
        expect(self.data.images >= most, f"data.images: {self.data.images} is too small for a sequence of {most} frames")
        for name, value in values.items():
            if name.startswith(("loss.", "optimizer.", "mask.")) and name != "optimizer.kind":
                expect(0 <= value < math.inf, f"{name}: {value} must be at least 0 and finite")
        expect(self.optimizer.clip > 0, "optimizer.clip must be greater than 0: 0 would stop all learning")
        for name in ("lr", "mask_lr"):
            expect(values[f"optimizer.{name}"] >= self.optimizer.floor, f"optimizer.{name} must be at least optimizer.floor")
        dense = self.loss.depth or self.loss.points
        expect(self.trainable != "dense" or bool(dense), "trainable: dense needs loss.depth or loss.points, and both are 0")
        expect(self.mask.hold_start <= self.mask.hold_end, "mask.hold_start must be at most mask.hold_end")
        expect(any(values[f"loss.{name}"] for name in HEADS), f"loss: the weights of {', '.join(HEADS)} are all 0: set one of them")

    def _check_attention(self) -> None:
        try:
            AttentionPlan.of(self.attention, preset(self.model))
        except InputError as error:
            raise ConfigError(f"attention: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """All keys and values, with groups as nested dictionaries."""
        return dataclasses.asdict(self)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted keys, such as "optimizer.lr"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file (None = the defaults), with overrides such as "data.seed=3".

    Raises:
        ConfigError: the file is missing or not YAML, a key does not exist, or a value has the wrong type or contradicts another.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_bytes()) or {}
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date such as 2020-02-31
            raise ConfigError(f"{path} is not YAML, see configs/ for examples: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must contain keys and values, see configs/ for examples")
    for override in overrides:
        key, found, text = override.partition("=")
        if not found:
            raise ConfigError(f"{override!r} is not an override: write KEY=VALUE, such as data.seed=3")
        *groups, name = key.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key}: {group} is a value, not a group")
        try:
            place[name] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"{override!r}: the value is not YAML") from None
    return _build(RunConfig, values, "")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    built = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"unknown key {prefix}{key}: choose one of {', '.join(hints)}")
        built[key] = _convert(hints[key], value, prefix + key)
    return cls(**built)


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{name} is a group: give its keys")
        assert isinstance(kind, type)
        return _build(kind, value, f"{name}.")
    if kind == tuple[int, int]:
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(x) is int for x in value):
            return value[0], value[1]
        raise ConfigError(f"{name} must be two whole numbers, like [2, 8], not {value!r}")
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number, not {value!r}") from None
    if kind is float and type(value) is int:
        return float(value)
    if kind == str | None and (value is None or isinstance(value, str)):
        return value
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ConfigError(f"{name} must be of type {getattr(kind, '__name__', kind)}, not {value!r}")
