"""Commands under `torchrun`: a process group, rank 0 that speaks, and an end for all when one fails."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import NoReturn, TypeAlias

import torch
import torch.distributed as dist

from page4d_kernels import BackendError
from page4d_kernels.env import VariableError

from ..errors import RankError, UserError
from ..execution.memory import is_out_of_memory
from ..execution.ranks import Ranks, deadline, reason_of
from ..model.opening import open_device, own_device
from .common import run_command
from .parser import accept_all_names, launched

Follow: TypeAlias = Callable[[dist.ProcessGroup, torch.device], None]

SIGTERM = "ended by SIGTERM, which torchrun sends when another process has ended, or when it is ended itself"
HEARD = 3.0  # seconds in which rank 0 may take over what failed here


def run_on_ranks(device: str | None, lead: Callable[[dist.ProcessGroup], str], follow: Follow) -> int:
    """Rank 0 runs `lead` and prints the report that it returns, the others run `follow`. The exit code, or the end of the process if a rank
    failed: what is still on its way to it would keep others waiting.
    """
    there = launched()
    assert there is not None
    signal.signal(signal.SIGTERM, _terminated)
    code = run_command(lambda: lead(_join(device)[0])) if there[0] == 0 else _follow(device, there[0], follow)
    if code:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    dist.destroy_process_group()
    return code


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End as by an error, so that no temporary files stay."""
    if dist.is_initialized() and dist.group.WORLD is not None:
        told = Ranks.failure_of(dist.group.WORLD)
        if told is not None:
            raise told
    raise RankError(None, SIGTERM)


def _join(device: str | None) -> tuple[dist.ProcessGroup, torch.device]:
    """The group of all processes, and the device of this one."""
    opened = open_device(own_device(device))
    if opened.type == "cuda":
        torch.cuda.set_device(opened)
    dist.init_process_group("nccl" if opened.type == "cuda" else "gloo", timeout=timedelta(seconds=deadline()))
    assert dist.group.WORLD is not None
    return dist.group.WORLD, opened


def _follow(device: str | None, rank: int, follow: Follow) -> int:
    """The exit code of a rank that follows. It speaks only if rank 0 cannot."""
    accept_all_names()
    logging.basicConfig(level=logging.WARNING, format=f"%(levelname)s: rank {rank}: %(message)s")
    ranks: Ranks | None = None
    try:
        group, opened = _join(device)
        ranks = Ranks.of(group, opened)
        follow(group, opened)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        # then rank 0 or torchrun speaks
        said = isinstance(error, KeyboardInterrupt) or (isinstance(error, RankError) and (error.rank == 0 or error.reason == SIGTERM))
        if not said and (ranks is None or not ranks.heard(HEARD)):
            print(f"error: {error}" if isinstance(error, RankError) else f"error: rank {rank}: {reason_of(error)}", file=sys.stderr)
        if not isinstance(error, (UserError, BackendError, VariableError, KeyboardInterrupt, OSError)) and not is_out_of_memory(error):
            traceback.print_exc()
        return 130 if isinstance(error, KeyboardInterrupt) else 1
