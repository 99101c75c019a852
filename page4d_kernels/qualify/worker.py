"""The child process in which one backend is judged: `python -m page4d_kernels.qualify.worker`, a job as JSON on standard input.

It writes one JSON object per line to standard output: where it is, what it found. Three times it waits for its turn: it says "ready", and
goes on when it gets a line. First it imports what it needs, then it runs the battery of every dtype and direction, then it measures. What a
kernel prints goes to standard error.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..backends.registry import BackendError, Registry, registries
from ..timing import Clock, interleaved
from . import battery
from .classes import FORWARD, TRAINING, class_of, part_of
from .record import ENTIRE
from .trial import Draw, Setting, Timed, settings, trials_of

SLICE = 0.3  # seconds for the measurement of one class
ORPHANED = 600.0  # seconds without a word, after which the process ends itself, even if Python code does not run any more


def judge(registry: Registry, job: dict[str, Any], say: Callable[..., None]) -> dict[str, Setting]:
    """Run the battery, and return the parts that passed, now or by the record. Each verdict is said."""
    passed: dict[str, Setting] = {}
    for part, setting in settings(job["op"], job["device"], job["dtypes"], job["directions"], job["head_dims"]).items():
        if part in job["judged"]:
            passed |= {part: setting} if part in job["passed"] else {}
        elif setting.training and FORWARD in job["directions"] and part.replace(TRAINING, FORWARD) not in passed:
            say(skipped=part, reason="it does not serve the forward")
        elif _pass(registry, job, part, setting, say):
            passed[part] = setting
    return passed


def _pass(registry: Registry, job: dict[str, Any], part: str, setting: Setting, say: Callable[..., None]) -> bool:
    """Whether the backend passes the battery of one part."""

    def at(trial: str, safe: bool) -> None:
        say(at=f"{part}, {trial}", part=part, safe=safe)

    draw = Draw(random.Random(job["seed"]))
    try:
        served, refusals = battery.judge(registry, job["backend"], trials_of(job["op"]).trials(setting, draw), at)
    except battery.Disqualified as error:
        for failed in {part, error.part}:
            say(failed=failed, reason=f"{error} (--seed {job['seed']} repeats it)")
        return False
    except Exception as error:  # of the battery itself, such as too little memory: it says nothing about the backend
        say(skipped=part, reason=_line(error))
        return False
    if not served:
        say(skipped=part, reason="; ".join(dict.fromkeys(refusals)))
        return False
    for name in {part, *served}:
        say(passed=name, lengths=draw.lengths)
    return True


def measure(registry: Registry, job: dict[str, Any], passed: dict[str, Setting], seconds: float, say: Callable[..., None]) -> None:
    """Time the classes, the backend and the safe one in turns, until `seconds` have gone.

    The first are the most important: forward, and what `timed` yields first. What cannot be compared here has had its turn as well.
    """
    deadline = time.monotonic() + seconds
    for part, setting in passed.items():
        try:
            calls = list(_measured(registry, job, setting, deadline, say))
        except _Failed as error:
            say(failed=part, reason=str(error))
        except Exception as error:  # its inputs do not fit into the memory
            say(lacked=f"{part}, {_line(error)}")
        else:
            if all(calls):
                say(complete=part)


class _Failed(Exception):
    """The reason in words."""


def _measured(registry: Registry, job: dict[str, Any], setting: Setting, deadline: float, say: Callable[..., None]) -> Iterator[bool]:
    """By class, whether it has had its turn."""
    for timed in trials_of(job["op"]).timed(setting):
        name = class_of(timed.problem)
        if registry.reasons(job["backend"], timed.problem) or name in job["timed"]:
            yield True
            continue
        try:
            safe = registry.safe_choice(timed.problem)
            found = [] if safe == job["backend"] else _measure(job["backend"], safe, timed, setting.device, deadline, say)
        except Exception as error:  # it would end the user's call as well
            if not isinstance(error, BackendError) and not battery.is_out_of_memory(error):
                raise _Failed(f"timing, {name}: {_line(error)}") from None
            say(lacked=f"{name}, {_line(error)}")  # nothing safe to compare with, or no memory
            found = []
        if found is None:
            say(untimed=name)
        elif found:
            say(timed=name, seconds=found)
        yield found is not None


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


def _measure(backend: str, safe: str, timed: Timed, device: str, deadline: float, say: Callable[..., None]) -> list[float] | None:
    """Seconds of the backend and of the safe one; None if there is no time for it."""
    if time.monotonic() > deadline:
        return None
    name = class_of(timed.problem)
    runs: dict[str, Callable[[], object]] = {backend: functools.partial(timed.run, backend), safe: functools.partial(timed.run, safe)}
    where = {"at": f"timing, {name}", "part": part_of(timed.problem)}
    say(**where, safe=False)
    found = runs[backend]()  # it may compile
    if device == "cuda":
        torch.cuda.synchronize()
    say(**where, safe=True)
    if not _agree(found, runs[safe](), timed.problem.dtype):
        raise ValueError("its result is not that of the safe backend")
    del found
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
        faulthandler.dump_traceback_later(ORPHANED, exit=True)
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
    faulthandler.cancel_dump_traceback_later()
    line = sys.stdin.readline()
    if not line:  # the parent has gone
        sys.exit(1)
    return line


def main() -> None:
    job, say = channel()
    try:
        for module in job["modules"]:
            importlib.import_module(module)
        registry = registries()[job["op"]]
        registry.get(job["backend"])
    except Exception as error:
        say(skipped=ENTIRE, reason=f"it could not be loaded in a process of its own ({_line(error)})")
        say(done=True)
        return
    wait(say)
    passed = judge(registry, job, say)
    measure(registry, job, passed, float(wait(say)), say)
    say(done=True)


if __name__ == "__main__":
    main()
