"""Tile sizes of the kernels: built in, from a table, or timed on first use.

A configuration is a dictionary of launch constants, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}.
Its key holds the kernel, the architecture, the head dim, channels or hidden size, the dtype and, for attention, how rows see the bias and
whether there are few or many. It does not hold the sequence length or batch size: a new clip length triggers no timing and no compilation.

PAGE4D_AUTOTUNE sets when candidates are timed:

    off   never (the default): the key's entry in a table, else the first candidate
    fast  on first use of a key that no table has, over the first four candidates
    full  on first use of every key, over all candidates

Two tables are read: the file PAGE4D_AUTOTUNE_TABLE, and the one shipped for the architecture, such as `tables/sm_90.json`. Every timed
choice is added to the first. To ship a table, copy such a file to `tables/`.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import triton

from .. import env
from .target import architecture, interpreted, limits

logger = logging.getLogger("page4d_kernels")

Config = dict[str, int]
T = TypeVar("T")
TABLES = Path(__file__).parent / "tables"
MODES = ("off", "fast", "full")
FAST = 4  # candidates timed by "fast"
FEW = 4096  # rows: a single frame, as the encoder sees it, has at most 1374; a global layer passes the limit at 3 to 5 frames
_chosen: dict[str, Config] = {}  # choices timed by this process
_untimed: set[str] = set()  # keys of which no candidate ran: they are not tried again


@dataclass(frozen=True)
class ResourceEstimate:
    """Lower bound of the resources of one program of a configuration, without compiling it."""

    shared: int  # bytes
    accumulators: int  # fp32 values held in registers

    def fits(self, config: Config) -> bool:
        shared, registers = limits()
        threads = 32 * config["num_warps"]
        return self.shared <= shared and self.accumulators <= registers * threads * 3 // 4  # the rest is for addresses and operands


def mode() -> str:
    name = env.get("PAGE4D_AUTOTUNE") or "off"
    if name not in MODES:
        raise env.VariableError(f"PAGE4D_AUTOTUNE={name!r}: choose one of {', '.join(MODES)}")
    return name


def key(kernel: str, *traits: object) -> str:
    """Such as `mask_attention_fwd_kernel sm_90 D64 bfloat16 plain few`."""
    return " ".join([kernel, architecture(), *(str(trait).removeprefix("torch.") for trait in traits)])


def length_class(rows: int) -> str:
    """How a key names the number of query rows of a sequence. What is best for one frame need not be best for a long clip."""
    return "few" if rows <= FEW else "many"


def prune(candidates: list[Config], resources: Callable[[Config], ResourceEstimate]) -> list[Config]:
    """The candidates that fit by the estimate. If none does, the one that needs the least shared memory: its launch may raise the error."""
    fitting = [candidate for candidate in candidates if resources(candidate).fits(candidate)]
    return fitting or [min(candidates, key=lambda candidate: resources(candidate).shared)]


def choose(name: str, candidates: list[Config], run: Callable[[Config], object]) -> Config:
    """The configuration for key `name`. `run` launches a candidate and may be called many times."""
    if name in _chosen:
        return _chosen[name]
    timing = mode()
    known = _table(env.get("PAGE4D_AUTOTUNE_TABLE"), name.split(" ", 2)[1]).get(name)
    if timing == "off" or (timing == "fast" and known is not None) or name in _untimed or not _can_time():
        return known or candidates[0]
    times = [(_time(name, run, candidate), i) for i, candidate in enumerate(candidates[: FAST if timing == "fast" else None])]
    best, index = min(times)
    if best == float("inf"):
        _untimed.add(name)
        logger.warning(f"autotune: {name}: none of {len(times)} candidates ran, so the {'table' if known else 'first'} serves")
        return known or candidates[0]
    logger.info(f"autotune: {name}: {candidates[index]} ({best:.3f} ms, best of {len(times)})")
    _chosen[name] = candidates[index]
    own = env.get("PAGE4D_AUTOTUNE_TABLE")
    if own:
        dump(Path(own))
    return candidates[index]


def dump(path: Path) -> None:
    """Add the choices timed by this process to the table at `path`. The file is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _read(path) | _chosen
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(dict(sorted(entries.items())), file, indent=1)
    os.replace(file.name, path)
    _table.cache_clear()


@cache
def _table(own: str, architecture: str) -> dict[str, Config]:
    """The shipped table of the architecture, and over it the one at the path `own`, if that is not empty."""
    return _read(TABLES / f"{architecture}.json") | (_read(Path(own)) if own else {})


def _read(path: Path) -> dict[str, Config]:
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        for config in entries.values():
            if not all(isinstance(value, int) and value > 0 for value in config.values()):
                raise ValueError("a configuration holds positive integers only")
    except (ValueError, AttributeError, OSError) as error:
        raise env.VariableError(f"{path} is not a table of tile sizes ({error}): repair it or delete it") from None
    return entries


def _can_time() -> bool:
    """False in the interpreter, and while a CUDA graph is captured, because timing waits for the device."""
    return not interpreted() and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _time(name: str, run: Callable[[Config], object], config: Config) -> float:
    """Median milliseconds with a cold cache. Infinite for a configuration that fails, whatever with: it may need too many resources, break
    the compiler (a plain RuntimeError) or ptxas, or leave no memory for what clears the cache."""
    try:
        return float(triton.testing.do_bench(lambda: run(config), warmup=10, rep=50, return_mode="median"))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        logger.info(f"autotune: {name}: dropped {config}, which failed with {type(error).__name__}: {reason}")
        return float("inf")
