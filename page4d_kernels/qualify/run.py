"""Judges backends in child processes with deadlines, and writes the record."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from ..backends.registry import Backend, BackendError, registries
from . import record, trial
from .classes import FORWARD, part
from .record import ENTIRE, Entry, OpRecord, Verdict

WIDTH = min(4, os.cpu_count() or 1)  # batteries at the same time: most of a first one is imports and compilation
BATTERY = 0.65  # the share of the time after which batteries are stopped, so that those that passed can be timed
STALL = {"cpu": 20.0, "cuda": 120.0}  # seconds without a word, after which a child counts as hanging: it may compile meanwhile

Watch = Callable[[str, str], None]  # hears the name of a job and where it is; "" when it has ended


@dataclass(frozen=True)
class Job:
    op: str
    backend: str
    modules: tuple[str, ...] = ()  # imported first: where a backend from outside registers itself
    worker: str = "page4d_kernels.qualify.worker"  # the module that runs in the child

    @property
    def name(self) -> str:
        return f"{self.op} {self.backend}"


@dataclass
class Outcome:
    """What one child said."""

    verdict: Verdict = field(default_factory=Verdict)
    times: dict[str, list[float]] = field(default_factory=dict)
    untimed: list[str] = field(default_factory=list)  # classes for which no time was left
    lacked: list[str] = field(default_factory=list)  # what there was no memory for
    late: str = ""  # where it was when the time was up

    def entry(self, job: Job, environment: dict[str, str]) -> Entry:
        """As a record. One without ops if nothing was found."""
        found = Entry(environment, record.now())
        if self.verdict != Verdict():
            found.ops[job.op] = OpRecord({job.backend: self.verdict}, {name: {job.backend: pair} for name, pair in self.times.items()})
        return found

    def missed(self) -> list[str]:
        """What was left out, in words."""
        stopped = [f"stopped at {self.late}"] if self.late else []
        untimed = [f"no time was left for {len(self.untimed)} of its comparisons"] if self.untimed else []
        return stopped + untimed + [f"not compared: {what}" for what in self.lacked]


def jobs(
    device: torch.device, ops: Sequence[str] | None = None, backends: Sequence[str] | None = None, modules: Sequence[str] = ()
) -> list[Job]:
    """All backends to judge; of those named by `backends`, also ones that "auto" never takes.

    Raises:
        BackendError: there is no such op or backend.
    """
    known = registries()
    by_op: list[list[Job]] = []
    for op in ops or known:
        if op not in known:
            raise BackendError(f"unknown op {op!r}: choose one of {', '.join(known)}")
        by_op.append([])
        for candidate in known[op]:
            wanted = candidate.name in backends if backends else candidate.automatic and candidate.name not in known[op].safe
            if not wanted or candidate.unavailable():
                continue
            ours = getattr(candidate.forward, "func", candidate.forward).__module__.startswith("page4d_kernels")
            if backends or not ours or not known[op].reasons(candidate.name, known[op].typical(device.type)):
                by_op[-1].append(Job(op, candidate.name, () if ours else tuple(modules)))
    # in turns, so that when time is short each op has its first, which is ours
    found = [job for turn in itertools.zip_longest(*by_op) for job in turn if job is not None]
    for backend in backends or ():
        if not any(job.backend == backend for job in found):
            candidates = [
                registry.get(backend) for name, registry in known.items() if name in (ops or known) and backend in map(_name, registry)
            ]
            if not candidates:
                raise BackendError(f"no op has a backend {backend!r}: `page4d info` lists them; one of your own needs --import MODULE")
            raise BackendError(f"backend {backend!r} cannot serve here: {'; '.join(candidates[0].unavailable())}")
    return found


def _name(backend: Backend) -> str:
    return backend.name


class Child:
    """One child process. `read` takes in what it says until it is ready for more, has ended, hangs, or time is up."""

    def __init__(self, job: Job, settings: dict[str, Any], environment: dict[str, str], watch: Watch, keep: Callable[[Outcome], None]):
        self.job, self.outcome = job, Outcome()
        self._watch, self._keep = watch, keep
        self._at, self._part, self._in_backend = "", ENTIRE, False  # where it is, and whether code of the backend is running
        self._seed = settings["seed"]
        self._ended = threading.Lock()  # held once `end` has been called
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, closed with the object
        self._process = subprocess.Popen(
            [sys.executable, "-m", job.worker],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True, env=environment,
        )  # fmt: skip
        threading.Thread(target=self._collect, daemon=True).start()
        self.tell(json.dumps(settings | {"op": job.op, "backend": job.backend, "modules": job.modules}))

    def _collect(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, and `read` will say so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def read(self, deadline: float, stall: float) -> bool:
        """True as soon as it is ready for more. A backend that runs for `stall` seconds hangs."""
        while True:
            left = deadline - time.monotonic()
            patience = min(stall, left) if self._in_backend else left
            try:
                line = self._lines.get(timeout=max(0.0, patience))
            except queue.Empty:
                if patience < left:
                    self._fail(f"it hangs (no word for {stall:g} s)")
                else:
                    self.outcome.late = self._at or "its start"
                self.end()
                return False
            if line is None:
                self._died()
                return False
            try:
                said = json.loads(line)
                known = isinstance(said, dict)
            except ValueError:
                known = False
            if not known:  # of an import that prints
                continue
            if "ready" in said:
                self._in_backend = False
                return True
            if "done" in said:
                self.end()
                return False
            self._enter(said)

    def _enter(self, said: dict[str, Any]) -> None:
        verdict = self.outcome.verdict
        self._in_backend = "at" in said and not said.get("safe")
        if "at" in said:
            self._at, self._part = said["at"], said["part"]
            self._watch(self.job.name, self._at)
            return
        if "passed" in said:
            verdict.passed.append(said["passed"])
            verdict.lengths = sorted({*verdict.lengths, *said["lengths"]})
        elif "failed" in said:
            verdict.failed[said["failed"]] = said["reason"]
        elif "skipped" in said:
            verdict.skipped[said["skipped"]] = said["reason"]
        elif "timed" in said:
            self.outcome.times[said["timed"]] = said["seconds"]
        elif "complete" in said:
            verdict.timed.append(said["complete"])
        elif "untimed" in said:
            self.outcome.untimed.append(said["untimed"])
        elif "lacked" in said:
            self.outcome.lacked.append(said["lacked"])
        self._keep(self.outcome)

    def _fail(self, how: str) -> None:
        """It fails in everything, and in the part where it was."""
        for failed in (ENTIRE, self._part):
            self.outcome.verdict.failed[failed] = f"{self._at}: {how} (--seed {self._seed} repeats it)"
        self._keep(self.outcome)

    def _died(self) -> None:
        """Its output has ended. That counts against the backend if its code was running, unless the system ended it, as without memory."""
        if self._ended.locked():  # by us
            return
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its output and go on
            self._process.wait(5.0)
        code = self._process.poll()
        self.end()
        how = "it closed its output" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or [""])[-1]
        how += f", {last[:200]}" * bool(last)
        if self._in_backend and code != -signal.SIGKILL:
            self._fail(f"it ended the process ({how})")
        else:
            self.outcome.late = f"{self._at or 'its start'}, {how}"

    def end(self) -> None:
        """Kill what is left of it, with its own children."""
        if self._ended.acquire(blocking=False):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
        self._process.wait()


def qualify(
    device: torch.device,
    todo: Sequence[Job],
    seconds: float,
    *,
    dtypes: Sequence[str],
    directions: Sequence[str] = (FORWARD,),
    head_dims: Sequence[int] = (64,),
    seed: int | None = None,
    stall: float | None = None,
    known: Entry | None = None,
    keep: Callable[[Entry], None] = lambda entry: None,
    watch: Watch = lambda name, at: None,
) -> tuple[Entry, dict[str, list[str]]]:
    """Judge the backends of `todo`.

    Batteries run at the same time: `WIDTH` of them on a GPU. On a CPU they take turns, as two that use all its cores stand in each other's
    way. When all have ended, or most of the time has, those that passed measure one after the other.

    Args:
        seconds: for everything. Who has not passed by then is not judged, and what is not timed by then stays untimed.
        dtypes, directions, head_dims: what to look at, such as "bfloat16" and "forward".
        seed: of the random lengths; drawn if not given.
        stall: seconds without a word, after which a child counts as hanging; default by device.
        known: a record of this environment. What it holds is not judged again.
        keep: called with all that was found about a backend so far, whenever that is more, so that nothing is lost if the run is cut.
        watch: called with the name of a job and where it is; "" when it has ended.

    Returns:
        What was found, and by job what there was no time or memory for, in words.
    """
    start = time.monotonic()
    settings = {
        "device": device.type, "dtypes": list(dtypes), "directions": list(directions), "head_dims": list(head_dims),
        "threads": torch.get_num_threads(), "seed": random.SystemRandom().randrange(1 << 30) if seed is None else seed,
    }  # fmt: skip
    environment, facts, patience = _environment(device), record.environment(device), stall or STALL[device.type]
    turns = threading.Semaphore(1 if device.type == "cpu" else WIDTH)
    children: dict[Job, Child] = {}
    stopped = threading.Event()
    with contextlib.ExitStack() as stack:

        def battery(job: Job) -> bool:
            """Whether it is ready to measure."""

            def found(outcome: Outcome) -> None:
                keep(outcome.entry(job, facts))

            child = children[job] = Child(job, settings | _known(known, job), environment, watch, found)
            stack.callback(child.end)
            if stopped.is_set():  # while it was started
                child.end()
            deadline = start + BATTERY * seconds
            ready = child.read(deadline, patience)  # to start: it has imported what it needs
            if ready:
                with turns:
                    child.tell("judge")
                    ready = child.read(deadline, patience)
            if not ready:
                watch(job.name, "")
            return ready

        with ThreadPoolExecutor(WIDTH) as pool:
            try:
                ready = list(pool.map(battery, todo))
            except BaseException:  # Ctrl-C: the pool waits for its threads, and these for the children
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                stack.close()
                raise
        measuring = list(itertools.compress(todo, ready))
        for i, job in enumerate(measuring):
            share = max(0.0, start + seconds - time.monotonic()) / (len(measuring) - i)
            children[job].tell(str(share))
            children[job].read(time.monotonic() + 1.5 * share + 5.0, 3 * patience)  # a class that was begun is finished
            watch(job.name, "")
    entry = Entry(facts, record.now())
    for job in todo:
        entry.merge(children[job].outcome.entry(job, facts))
    return entry, {job.name: words for job in todo if (words := children[job].outcome.missed())}


def _known(entry: Entry | None, job: Job) -> dict[str, list[str]]:
    """For the child: the parts that have been judged, those that passed, and the classes that have been timed."""
    if entry is None:
        return {"judged": [], "passed": [], "timed": []}
    verdict = entry.verdict(job.op, job.backend)
    timed = [name for name, times in entry.ops.get(job.op, OpRecord()).times.items() if job.backend in times]
    judged = [*verdict.passed, *verdict.skipped, *verdict.failed]
    return {"judged": judged, "passed": [part for part in verdict.passed if not verdict.failure(part)], "timed": timed}


def done(entry: Entry, job: Job, dtypes: Sequence[str], directions: Sequence[str], head_dims: Sequence[int]) -> bool:
    """Whether a record holds all that a run would look at."""
    if job.op in registries():
        parts = list(trial.settings(job.op, "", dtypes, directions, head_dims))
    else:
        parts = [part(dtype, FORWARD, "") for dtype in dtypes]  # CUDA graphs
    return all(map(entry.verdict(job.op, job.backend).done, parts))


def _environment(device: torch.device) -> dict[str, str]:
    """Of the children: they import what this process would, follow no record, and see only this GPU, which is their "cuda"."""
    paths = [path or os.getcwd() for path in sys.path]
    same = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PAGE4D_QUALIFY": "off"}
    if device.type != "cuda":
        return same
    index = torch.cuda.current_device() if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return same | {"CUDA_VISIBLE_DEVICES": visible[index].strip() if len(visible) > index and visible[index].strip() else str(index)}
