"""The child process in which one backend is judged: `python -m page4d_kernels.qualify.worker`, a job as JSON on standard input.

It writes one JSON object per line to standard output: where it is, what it found. Three times it waits for its turn: it says "ready", and
goes on when it gets a line. First it imports what it needs, then it runs the battery of every dtype and direction, then it measures. What a
kernel prints goes to standard error.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..backends.registry import BackendError, Registry, registries
from ..timing import Clock, interleaved
from . import battery
from .classes import DTYPES, FORWARD, TRAINING, class_of, part_of
from .trial import Draw, Setting, Timed

SLICE = 0.3  # seconds for the measurement of one class
NAMED = {name: dtype for dtype, name in DTYPES.items()}


def trials_of(op: str) -> ModuleType:
    return importlib.import_module(f".trials.{op}", __package__)


def _at(say: Callable[..., None], part: str, trial: str, safe: bool) -> None:
    say(at=f"{part}, {trial}", safe=safe)


def judge(registry: Registry, job: dict[str, Any], say: Callable[..., None]) -> list[Setting]:
    """Run the battery, and return the settings that passed, now or by the record. Each verdict is said."""
    backend, trials = job["backend"], trials_of(job["op"]).trials
    passed: list[Setting] = []
    refused: list[str] = []
    for dtype in (NAMED[name] for name in job["dtypes"]):
        for direction in job["directions"]:
            part = f"{DTYPES[dtype]} {direction}"
            setting = Setting(job["device"], dtype, direction == TRAINING, tuple(job["head_dims"]))
            if setting.training and FORWARD in job["directions"] and dataclasses.replace(setting, training=False) not in passed:
                continue
            if part in job["judged"]:
                passed += [setting] if part in job["passed"] else []
                continue
            draw = Draw(random.Random(job["seed"]))
            try:
                served, refusals = battery.judge(registry, backend, trials(setting, draw), functools.partial(_at, say, part))
            except battery.Disqualified as error:
                for failed in {part, error.part}:
                    say(failed=failed, reason=str(error))
                continue
            except Exception as error:  # of the battery itself, such as too little memory: it says nothing about the backend
                say(lacked=f"{part}, {_line(error)}")
                continue
            if served:
                passed.append(setting)
                for name in {part, *served}:
                    say(passed=name, lengths=draw.lengths)
            else:
                refused += refusals
                say(skipped=part)
    if not passed and refused:
        say(refused="; ".join(dict.fromkeys(refused)))
    return passed


def measure(registry: Registry, job: dict[str, Any], settings: list[Setting], seconds: float, say: Callable[..., None]) -> None:
    """Time the classes, the backend and the safe one in turns, until `seconds` have gone. The first are the most important: forward, and
    what `timed` yields first."""
    deadline = time.monotonic() + seconds
    for setting in sorted(settings, key=lambda setting: setting.training):
        calls = iter(trials_of(job["op"]).timed(setting))
        while True:
            try:
                timed = next(calls, None)
            except Exception as error:  # its inputs do not fit into the memory
                say(lacked=_line(error))
                break
            if timed is None:
                break
            if registry.reasons(job["backend"], timed.problem):
                continue
            name = class_of(timed.problem)
            if name in job["timed"]:
                continue
            say(at=f"timing, {name}")
            try:
                found = _measure(registry, job["backend"], timed, setting.device, deadline)
            except Exception as error:  # it would end the user's call as well
                if isinstance(error, BackendError) or battery.is_out_of_memory(error):  # nothing safe to compare with, or no memory
                    say(untimed=name)
                    continue
                say(failed=part_of(timed.problem), reason=f"timing, {name}: {_line(error)}")
                break
            if found is None:
                say(untimed=name)
            else:
                say(timed=name, seconds=found)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _agree(found: Any, safe: Any, dtype: torch.dtype) -> bool:
    """Whether the results of a call at full size are those of the safe backend, as far as two right ones agree."""
    if isinstance(found, torch.Tensor):
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        return bool((found.double() - safe.double()).norm() <= tolerance * safe.double().norm() + 1e-9)
    if isinstance(found, dict):  # the gradient of the gate is a small difference of large terms
        return all(_agree(value, safe[name], dtype) for name, value in found.items() if "query_gate" not in name)
    return all(_agree(x, y, dtype) for x, y in zip(found, safe, strict=True))


def _measure(registry: Registry, backend: str, timed: Timed, device: str, deadline: float) -> list[float] | None:
    """Seconds of the backend and of the safe one; None if there is no time for it."""
    runs: dict[str, Callable[[], object]] = {}
    results = []
    for name in (backend, registry.safe_choice(timed.problem)):
        runs[name] = functools.partial(timed.run, name)
        results.append(runs[name]())  # it may compile
    if not _agree(results[0], results[1], timed.problem.dtype):
        raise ValueError("its result is not that of the safe backend")
    results.clear()
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
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    return job, say


def _end_with(parent: int) -> None:
    """End this process when its parent has gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def wait(say: Callable[..., None]) -> str:
    """Say that this stage is over, and wait for the turn of the next, with little memory. Returns what the parent says then."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(ready=True)
    return sys.stdin.readline()


def main() -> None:
    job, say = channel()
    try:
        for module in job["modules"]:
            importlib.import_module(module)
        registry = registries()[job["op"]]
        registry.get(job["backend"])
    except Exception as error:
        say(refused=f"it could not be loaded in a process of its own ({_line(error)})")
        say(done=True)
        return
    wait(say)
    passed = judge(registry, job, say)
    measure(registry, job, passed, float(wait(say)), say)
    say(done=True)


if __name__ == "__main__":
    main()
