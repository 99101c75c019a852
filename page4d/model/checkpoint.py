"""Read and write weights, strictly: official .pt files and our own .safetensors.

Both formats use the official parameter names. Our files also carry the model's configuration, as JSON in their metadata. Two heads may be
absent as a whole: the track head (official PAGE-4D files have none) and the mask head (VGGT files have none). The model then lacks that
head, and asking for its output is an error. Any other missing, unexpected or mis-shaped key is an error.
"""

from __future__ import annotations

import pickle
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..config import PRESETS, Page4DConfig, preset
from ..errors import CheckpointError, ConfigError
from ..files import AtomicFiles
from .wrappers import find_state, strip

MOST_TENSORS = 50_000  # the official model has 1803
ALIGNMENT = 64  # bytes, as of memory that torch allocates
CONFIG_KEY = "page4d_config"
UNREADABLE = (safetensors.SafetensorError, OSError, ValueError)  # raised for damaged safetensors files
BUNDLED = {"nano": Path(__file__).parents[1] / "assets" / "nano.safetensors"}  # see docs/nano.md
TRACK_HEAD = "track_head."
MASK_HEAD = "aggregator.spatial_mask_head."


class Configured(Protocol):
    """What is saved: a module with its configuration, such as `Page4D`."""

    config: Page4DConfig

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class HubFile:
    repository: str
    filename: str
    kind: str  # repo_type of huggingface_hub


HUB = {
    "page4d": HubFile("zhouk777/PAGE4D", "checkpoint_nomask.pt", "dataset"),
    "page4d-mask": HubFile("zhouk777/PAGE4D", "checkpoint_mask.pt", "dataset"),
    "vggt": HubFile("facebook/VGGT-1B", "model.safetensors", "model"),
}


@dataclass(frozen=True)
class KeyReport:
    """How the keys of a file fit a model."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]  # "key: (file) instead of (model)"

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        """One line: per kind the count by part of the model, and the first few keys."""
        parts = []
        for kind, keys in (("missing", self.missing), ("unexpected", self.unexpected), ("mis-shaped", self.misshaped)):
            if keys:
                groups = ", ".join(f"{group}.* {count}" for group, count in Counter(key.split(".")[0] for key in keys).items())
                shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
                parts.append(f"{len(keys)} {kind} ({groups}): {shown}")
        return "; ".join(parts) or "all keys fit"


def compare_keys(model: nn.Module, state: dict[str, Tensor]) -> KeyReport:
    wanted = model.state_dict()
    shapes = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    return KeyReport([key for key in wanted if key not in state], [key for key in state if key not in wanted], shapes)


def read_pretrained(name_or_path: str | Path, config: Page4DConfig | None = None) -> tuple[Page4DConfig, dict[str, Tensor]]:
    """The configuration of the model that some weights need, and their state dict. See `Page4D.from_pretrained`."""
    if str(name_or_path) in HUB:
        path, config = _download(str(name_or_path)), config or preset(str(name_or_path))
    else:
        path = local_file(name_or_path)
    state, stored = read_file(path)
    config = config or stored or preset("page4d")
    _check_stacks(config, state, path.name)
    return _fit_heads(config, state), state


def assign_weights(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Give a model on the meta device its weights, in fp32 on the CPU.

    Weights of an fp32 file stay memory-mapped until they are moved.

    Raises:
        CheckpointError: a key is missing, unexpected or mis-shaped. `name` is the file's name in the message.
    """
    report = compare_keys(model, state)
    if not report.fits:
        raise CheckpointError(f"{name} does not fit the model: {report}")
    model.load_state_dict(state, assign=True)
    model.float()
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:  # a file may place it anywhere, and the last bits of results depend on the alignment
            parameter.data = parameter.data.clone()


def local_file(path: str | Path) -> Path:
    """The path of a weights file that exists, or of the bundled weights of that name."""
    if str(path) in BUNDLED:
        bundled = BUNDLED[str(path)]
        if not bundled.is_file():
            raise CheckpointError(f"weights {str(path)!r}: {bundled} is missing from this installation; install page4d again")
        return bundled
    path = Path(path)
    if path.is_file():
        return path
    problem = "is a directory" if path.is_dir() else "is a pipe or device" if path.exists() else "does not exist"
    advice = f"random:{path} gives that preset random weights" if str(path) in PRESETS else f"or one of {', '.join([*BUNDLED, *HUB])}"
    raise CheckpointError(f"weights {str(path)!r}: the file {problem}; give a .pt or .safetensors file, {advice}")


def stored_config(name_or_path: str | Path) -> Page4DConfig | None:
    """The configuration of weights, without reading them: None if the file carries none, as official ones do."""
    if str(name_or_path) in HUB:
        return preset(str(name_or_path))
    path = local_file(name_or_path)
    return _config_in(path, _metadata(path)) if path.suffix == ".safetensors" else None


def _check_stacks(config: Page4DConfig, state: dict[str, Tensor], name: str) -> None:
    """Compare depth and width of the trunk before any module is made: a wrong configuration could ask for an endless model."""
    stacks = (
        ("depth", "aggregator.frame_blocks.", config.depth),
        ("depth", "aggregator.global_blocks.", config.depth),
        ("encoder.depth", "aggregator.patch_embed.blocks.", config.encoder.depth),
    )
    for field, prefix, wanted in stacks:
        found = len({key[len(prefix) :].split(".", 1)[0] for key in state if key.startswith(prefix)})
        if found != wanted:
            raise CheckpointError(f"{name} does not fit the model: {field} {found} (by {prefix}*) instead of {wanted}")
    token = state.get("aggregator.camera_token")
    width = token.shape[-1] if token is not None and token.dim() else config.embed_dim
    if width != config.embed_dim:
        raise CheckpointError(f"{name} does not fit the model: embed_dim {width} instead of {config.embed_dim}")


def _fit_heads(config: Page4DConfig, state: dict[str, Tensor]) -> Page4DConfig:
    """The configuration without the heads that the file lacks as a whole."""
    if not any(key.startswith(TRACK_HEAD) for key in state):
        config = config.replace(track=None)
    if not any(key.startswith(MASK_HEAD) for key in state) and config.mask_hidden is not None:
        if config.mask_strength > 0:
            raise CheckpointError("these weights have no mask head, which the configuration needs: set mask_strength=0")
        config = config.replace(mask_hidden=None)
    elif config.mask_hidden is None and any(key.startswith(MASK_HEAD) for key in state):
        raise CheckpointError("these weights have a mask head, but the configuration has none: set mask_hidden=256")
    return config


def read_file(path: Path) -> tuple[dict[str, Tensor], Page4DConfig | None]:
    """State dict and, for our own files, the configuration. Executes nothing out of the file."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile_format(path))
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path.name} is not a weights file: it is not a checkpoint, or holds pickled Python objects such as a whole module, "
            f"which are not executed ({first[:120]}); save its state_dict() alone"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError, RecursionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path.name} cannot be read as a checkpoint, it may be truncated ({first[:120]}); fetch it again") from None
    return strip(_weights(path, find_state(content, path.name)), path.name), None


def _weights(path: Path, state: dict[Any, Tensor]) -> dict[str, Tensor]:
    for key, value in state.items():
        if not isinstance(key, str) or not value.is_floating_point() or value.layout != torch.strided or value.is_meta or value.is_nested:
            raise CheckpointError(f"{path.name}: {key!r} ({value.dtype}, {value.layout}) is not a named floating-point weight")
    return state


def zipfile_format(path: Path) -> bool:
    """Only torch's zip format can be mapped; files of old releases are read as a whole."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Page4DConfig | None]:
    config = _config_in(path, _metadata(path))
    try:
        state = safetensors.torch.load_file(path)
    except UNREADABLE as error:
        raise _damaged(path, error) from None
    return strip(_weights(path, state), path.name), config


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path.name} cannot be read as safetensors, it may be truncated ({error}); fetch it again")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            count = len(file.keys())
            if count > MOST_TENSORS:
                raise CheckpointError(f"{path.name} holds {count} tensors, more than any PAGE-4D model has")
            return file.metadata() or {}
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise _damaged(path, error) from None


def _config_in(path: Path, metadata: dict[str, str]) -> Page4DConfig | None:
    try:
        return Page4DConfig.from_json(metadata[CONFIG_KEY]) if CONFIG_KEY in metadata else None
    except ConfigError as error:
        raise CheckpointError(f"{path.name}: its metadata holds {error}") from None


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    file = HUB[name]
    try:
        return Path(hf_hub_download(file.repository, file.filename, repo_type=file.kind))
    except (OSError, HfHubHTTPError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = "" if file.kind == "model" else f"{file.kind}s/"
        raise CheckpointError(
            f"weights {name!r} could not be fetched from the Hugging Face hub ({textwrap.shorten(first, 100, placeholder='...')}): "
            f"check the connection, or download the file and give its path: {file.filename} of https://huggingface.co/{kind}{file.repository}"
        ) from None


def save_pretrained(model: Configured, path: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Our own format: safetensors with the configuration inside. `dtype` converts every weight (bf16 or fp16 halve the file)."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path.name} has to end in .safetensors")
    state = {key: _stored(value, dtype) for key, value in model.state_dict().items()}
    metadata = {"format": "pt", CONFIG_KEY: model.config.to_json()}
    with AtomicFiles() as files:
        file = files.add(path)
        file.touch()
        mode = file.stat().st_mode
        safetensors.torch.save_file(state, file, metadata)
        file.chmod(mode)  # safetensors makes files that nobody else may read
    return path


def save_official(model: nn.Module, path: str | Path) -> Path:
    """The official release's format: {'model': fp32 state dict} by torch.save, for the official code to load."""
    path = Path(path)
    state = {key: _stored(value, torch.float32) for key, value in model.state_dict().items()}
    with AtomicFiles() as files:
        torch.save({"model": state}, files.add(path))
    return path


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.detach().to("cpu", dtype).contiguous()
