"""State dicts inside what other programs wrap around them: dictionaries with more entries, and prefixes of the parameter names."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import Tensor

from ..errors import CheckpointError

PARTS = ("aggregator", "camera_head", "depth_head", "point_head", "track_head")  # the first words of a model's parameter names
ENTRIES = ("model", "state_dict", "model_state_dict", "module", "net", "network", "weights", "ema", "ema_state_dict", "model_ema")
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.")  # of DistributedDataParallel, wrappers and torch.compile
DEPTH = 4  # of dictionaries inside each other

log = logging.getLogger(__name__)


def find_state(content: object, name: str) -> dict[str, Tensor]:
    """The state dict in what a checkpoint holds. What is left out is logged.

    Raises:
        CheckpointError: there is none.
    """
    state, entry = _unwrap(content, DEPTH)
    if state is None:
        raise CheckpointError(f"{name} holds no state dict: expected names and tensors, bare or under one of {', '.join(ENTRIES[:3])}")
    if entry.startswith(("ema", "model_ema")):
        log.warning("%s: its weights are taken from the entry %r", name, entry)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    others = [key for key in state if key not in tensors]
    if others:
        log.warning("%s: %d entries are no weights and are left out, such as %.40r", name, len(others), others[0])
    return tensors


def strip(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state with a model's parameter names: without the prefixes of wrappers, if all names have them. This is logged.

    Raises:
        CheckpointError: no name is a model's.
    """
    prefix, keys = "", list(state)
    while not _known(keys):
        found = next((p for p in PREFIXES if all(key.startswith(p) for key in keys)), None)
        if found is None:
            break
        prefix, keys = prefix + found, [key[len(found) :] for key in keys]
    keys = [re.sub(r"(^|\.)_orig_mod\.", r"\1", key) for key in keys]  # of parts that were compiled alone
    if not _known(keys):
        shown = ", ".join(f"{key:.60}" for key in list(state)[:3])
        raise CheckpointError(
            f"{name} holds no PAGE-4D or VGGT weights: its names are {shown}, ... ({len(state)}), not {PARTS[0]}. and so on"
        )
    if len(set(keys)) < len(keys):
        raise CheckpointError(f"{name}: two of its names are one without their prefixes: save the state dict of the bare model")
    if keys != list(state):
        log.warning("%s: the names of its weights are read without %r", name, prefix or "_orig_mod.")
    return dict(zip(keys, state.values(), strict=True))


def _known(keys: list[str]) -> bool:
    return any(key.split(".", 1)[0] in PARTS for key in keys)


def _unwrap(content: object, depth: int) -> tuple[dict[str, Any] | None, str]:
    """The innermost dictionary with tensors, and the name of its entry, in the order of ENTRIES."""
    if not isinstance(content, dict):
        return None, ""
    inner = [(key, *_unwrap(content[key], depth - 1)) for key in ENTRIES if depth and isinstance(content.get(key), dict)]
    for key, state, _ in inner:
        if state is not None:
            return state, key
    tensors = any(isinstance(value, Tensor) for value in content.values())
    return (content, "") if tensors else (None, "")
