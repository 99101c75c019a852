"""The child process in which one backend is judged: `python -m page4d_kernels.qualify.worker`, a job as JSON on standard input.

It writes one JSON object per line to standard output: where it is, what it found. It first runs the battery of every dtype and direction,
then says "ready" and waits for a line. Then it measures. What a kernel prints goes to standard error.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..backends.registry import BackendError, Registry, registries
from ..timing import Clock, interleaved
from . import battery
from .classes import DTYPES, FORWARD, TRAINING, class_of
from .record import ENTIRE
from .trial import Draw, Setting, Timed

SLICE = 0.3  # seconds for the measurement of one class
NAMED = {name: dtype for dtype, name in DTYPES.items()}


def trials_of(op: str) -> ModuleType:
    return importlib.import_module(f".trials.{op}", __package__)


def _at(say: Callable[..., None], part: str, trial: str) -> None:
    say(at=f"{part}, {trial}")


def judge(registry: Registry, job: dict[str, Any], say: Callable[..., None]) -> list[Setting]:
    """Run the battery, and return the settings that passed. Each verdict is said."""
    backend, trials = job["backend"], trials_of(job["op"]).trials
    passed: list[Setting] = []
    refused: list[str] = []
    for dtype in (NAMED[name] for name in job["dtypes"]):
        for direction in job["directions"]:
            part = f"{DTYPES[dtype]} {direction}"
            setting = Setting(job["device"], dtype, direction == TRAINING, tuple(job["head_dims"]))
            if setting.training and FORWARD in job["directions"] and dataclasses.replace(setting, training=False) not in passed:
                continue
            draw = Draw(random.Random(job["seed"]))
            try:
                served, refusals = battery.judge(registry, backend, trials(setting, draw), functools.partial(_at, say, part))
            except battery.Disqualified as error:
                say(failed=part, reason=str(error))
                continue
            if served:
                passed.append(setting)
                say(passed=part, lengths=draw.lengths)
            else:
                refused += refusals
    if not passed and refused:
        say(refused="; ".join(dict.fromkeys(refused)))
    return passed


def measure(registry: Registry, job: dict[str, Any], settings: list[Setting], seconds: float, say: Callable[..., None]) -> None:
    """Time the classes, the backend and the safe one in turns, until `seconds` have gone. The first classes are the most important."""
    deadline = time.monotonic() + seconds
    for setting in settings:
        for timed in trials_of(job["op"]).timed(setting):
            if registry.reasons(job["backend"], timed.problem):
                continue
            name = class_of(timed.problem)
            say(at=f"timing, {name}")
            try:
                found = _measure(registry, job["backend"], timed, setting.device, deadline)
            except (BackendError, torch.OutOfMemoryError):  # nothing safe to compare with, or no memory
                found = None
            except Exception as error:  # it would end the user's call as well
                say(failed=name.partition(",")[0], reason=f"timing, {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                break
            if found is None:
                say(untimed=name)
            else:
                say(timed=name, seconds=found)


def _measure(registry: Registry, backend: str, timed: Timed, device: str, deadline: float) -> list[float] | None:
    """Seconds of the backend and of the safe one; None if there is no time for it."""
    runs: dict[str, Callable[[], object]] = {}
    for name in (backend, registry.safe_choice(timed.problem)):
        runs[name] = functools.partial(timed.run, name)
        runs[name]()  # it may compile
    clock = Clock(device)
    once = sum(clock.seconds(run) for run in runs.values())
    if time.monotonic() + 4 * once > deadline:
        return None
    times = interleaved(runs, device, min(SLICE, deadline - time.monotonic()))
    return [times[name].lower for name in runs]  # quartiles: what else the machine does meanwhile only ever adds time


def channel() -> tuple[dict[str, Any], Callable[..., None]]:
    """The job, and the function that writes a line. From now on prints go to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**what: Any) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    return job, say


def wait(say: Callable[..., None]) -> float:
    """Say that the battery is over, and wait for the turn to measure, with little memory. Returns the seconds for it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(ready=True)
    return float(sys.stdin.readline())


def main() -> None:
    job, say = channel()
    try:
        for module in job["modules"]:
            importlib.import_module(module)
        registry = registries()[job["op"]]
        registry.get(job["backend"])
    except (ImportError, BackendError) as error:
        say(failed=ENTIRE, reason=f"it could not be loaded in a process of its own ({error})")
        say(done=True)
        return
    passed = judge(registry, job, say)
    measure(registry, job, passed, wait(say), say)
    say(done=True)


if __name__ == "__main__":
    main()
