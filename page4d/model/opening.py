"""Devices and models by the names that users give them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ..config import Page4DConfig, preset
from ..errors import InputError
from .checkpoint import stored_config
from .page4d import Page4D, default_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANDOM, RANDOM_PRESET = "random", "small"
DEFAULT_WEIGHTS = "nano"
RELEASED = "--weights page4d, page4d-mask, vggt or a file"


def open_device(name: str | None) -> torch.device:
    """The device called `name`, after a trial allocation. Without a name: cuda if available, else mps, else cpu."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it does not compute")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def own_device(name: str | None) -> str | None:
    """The device to use. Under `torchrun` "cuda" becomes this process' own GPU, so that not all processes allocate on the first one.

    None is treated as "cuda" if a GPU is available, and is returned unchanged otherwise.
    """
    local = os.environ.get("LOCAL_RANK")
    any_gpu = name == "cuda" or (name is None and torch.cuda.is_available())
    return f"cuda:{local}" if local is not None and any_gpu else name


def check_weights(weights: str) -> Page4DConfig:
    """The configuration of the weights called `weights`, without reading them.

    Raises:
        CheckpointError: the file does not exist.
    """
    kind, _, name = weights.partition(":")
    if kind == RANDOM:
        return preset(name or RANDOM_PRESET)
    return stored_config(weights) or preset("page4d")


def open_model(weights: str, device: torch.device, dtype: torch.dtype, seed: int = 0, say: Callable[[str], None] = print) -> Page4D:
    """A model in eval mode with the weights called `weights`; "random:PRESET" gives random weights. `say` hears what they are good for."""
    kind, _, name = weights.partition(":")
    if weights == DEFAULT_WEIGHTS:
        say(f"weights: {weights}, a small model trained on rendered scenes only (docs/nano.md); for real videos use {RELEASED}")
    if kind != RANDOM:
        return Page4D.from_pretrained(weights, device=device, dtype=dtype)
    name = name or RANDOM_PRESET
    config = preset(name)
    say(
        f"RANDOM WEIGHTS ({name} preset, {device.type}): the outputs are noise and only show that everything runs; "
        f"for real results use {RELEASED}"
    )
    torch.manual_seed(seed)
    return Page4D(config).set_compute_dtype(dtype).to(device).eval()
