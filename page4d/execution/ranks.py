"""The processes that share one sequence: what they exchange, and how all of them end when one fails.

Tensors go through a process group of torch.distributed (nccl on GPUs, gloo on CPUs), words through its store. One collective does all:
`all_to_all_single` with sizes of one's own for each rank, on bytes. So a shard may be of any length, and bytes are counted exactly.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from page4d_kernels import env
from page4d_kernels.profiling import stage

from ..errors import InputError, RankError
from .memory import is_out_of_memory

DEADLINE = 300.0  # seconds
LOOK = 0.5  # seconds between looks at the store while waiting
GRACE = 5.0  # seconds in which a living process answers
PATIENCE = 30.0  # the same, where nobody waits in an exchange: a process that loads weights may be deaf for a while
SLEEP = 0.002
EXCHANGE = "exchange"  # the stages of waiting, inside those of the model


@dataclass
class Traffic:
    """What exchanges of one kind cost this rank."""

    exchanges: int = 0
    bytes: int = 0  # sent to other ranks
    seconds: float = 0.0  # that this process waited; on a GPU it does not wait


class Ranks:
    """This process among those of a group. Every method that exchanges must be called by all of them, in the same order.

    Args:
        group: of torch.distributed, with a backend for the device.
        device: of the tensors.

    Raises:
        InputError: the group has no backend for the device, or this process is not in the group.
        RankError: another process failed, ended, or did not come within PAGE4D_DEADLINE seconds. The group cannot be used any more, except
            after a refusal (see `refusing`).
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self._group = weakref.ref(group)  # `_known` must not keep it
        self.device, self.deadline = device, deadline()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise InputError("this process is not in the group that was given")
        if device.type not in dist.get_backend_config(group):
            raise InputError(
                f"the process group ({dist.get_backend_config(group)}) has no backend for {device.type}: use nccl for cuda, gloo for cpu"
            )
        base = dist.distributed_c10d._get_default_store()
        self.store = dist.PrefixStore(f"page4d/{group.group_name}", base)
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._round = self._command = self._forgotten = 0
        self.store.set(f"joined/{self.rank}", "1")
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(weakref.ref(self), stop), name="page4d-watch", daemon=True)
        watcher.start()
        weakref.finalize(self, _stop, stop, watcher)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise InputError("the process group has been destroyed: make another one")
        return group

    @classmethod
    def of(cls, group: dist.ProcessGroup, device: torch.device) -> Ranks:
        """The same object for the same group, as the count of rounds belongs to the group."""
        if group not in _known:
            _known[group] = cls(group, device)
        if _known[group].device.type != device.type:
            raise InputError(f"the process group is already in use with {_known[group].device.type}: make another one for {device.type}")
        return _known[group]

    @staticmethod
    def failure_of(group: dist.ProcessGroup) -> RankError | None:
        """What a process of the group has told, if it is in use."""
        ranks = _known.get(group)
        if ranks is None:
            return None
        with contextlib.suppress(RuntimeError):
            ranks._failure = ranks._failure or ranks.told()
        return ranks._failure

    # --- agreement -------------------------------------------------------------------------------------------------------------------

    def agree(self, facts: dict[str, Any], patient: bool = False) -> list[dict[str, Any]]:
        """The facts of all ranks, in their order. They must be JSON. `patient`: without the deadline, where a rank may have much to do."""
        return [message["facts"] for message in self._meet({"facts": facts}, math.inf if patient else None)]

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Around the checks before `agree`: if they raise, the others learn it there and raise a RankError. The group stays usable."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(RankError):
                self._post({"error": reason_of(error)})
            raise

    def _post(self, message: dict[str, Any]) -> int:
        number, self._round = self._round, self._round + 1
        with self._store_is_there():
            self.store.set(f"round {number}/{self.rank}", json.dumps(message))
        return number

    def _meet(self, message: dict[str, Any], deadline: float | None) -> list[dict[str, Any]]:
        number = self._post(message)
        keys = [f"round {number}/{rank}" for rank in range(self.size)]
        self.wait_until(lambda: all(self.store.check([key]) for key in keys), "the next pass", lambda: self._absent(keys), deadline)
        with self._store_is_there():
            found = [json.loads(self.store.get(key)) for key in keys]
            for old in range(self._forgotten, number):  # all have left these rounds
                self.store.delete_key(f"round {old}/{self.rank}")
        self._forgotten = number
        for rank, other in enumerate(found):
            if "error" in other and rank != self.rank:
                raise RankError(rank, other["error"])
        return found

    def _absent(self, keys: Sequence[str]) -> list[int]:
        return [rank for rank, key in enumerate(keys) if not self.store.check([key])]

    # --- commands --------------------------------------------------------------------------------------------------------------------

    def tell(self, command: dict[str, Any]) -> None:
        """Rank 0 tells all others what to do next, as JSON."""
        with self._store_is_there():
            self.store.set(f"command {self._command}", json.dumps(command))
            if self._command > 1:  # all have read it: they meet rank 0 after each command
                self.store.delete_key(f"command {self._command - 2}")
        self._command += 1

    def listen(self) -> dict[str, Any]:
        """The next command. Rank 0 may have other work meanwhile: there is no deadline."""
        key = f"command {self._command}"
        self.wait_until(lambda: self.store.check([key]), "the next command", lambda: [0], math.inf)
        self._command += 1
        with self._store_is_there():
            return json.loads(self.store.get(key))

    # --- exchange --------------------------------------------------------------------------------------------------------------------

    def start(self, kind: str, send: Tensor, sizes: Sequence[int], receive: Tensor, expected: Sequence[int]) -> Pending:
        """Send contiguous `send` in parts along its first dimension, `sizes[r]` rows to rank r, and receive `expected[r]` rows from r."""
        self.check()
        per_row = send[0].nbytes if len(send) else 0
        row_in = receive[0].nbytes if len(receive) else 0
        traffic = self.traffic[kind]
        traffic.exchanges += 1
        traffic.bytes += per_row * (sum(sizes) - sizes[self.rank])
        out, given = (x.detach().reshape(-1).view(torch.uint8) for x in (receive, send))
        here, there = [row_in * n for n in expected], [per_row * n for n in sizes]
        try:
            work = dist.all_to_all_single(out, given, here, there, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self._lost(str(error), []) from error
        return Pending(self, kind, work, receive, send)

    def finish(self) -> None:
        """At the end of a pass: RankError if some process has failed in it. On a GPU, first wait: exchanges may have been aborted."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.check()

    def check(self) -> None:
        """RankError if some process has failed. This costs no message."""
        if self._failure is not None:
            raise self._failure

    _failure: RankError | None = None  # is set by the watcher too

    # --- failure ---------------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around work with exchanges: an exception is told to the others, who raise a RankError with its reason wherever they wait."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            self.fail(reason_of(error))
            raise

    def fail(self, reason: str, rank: int | None = None) -> None:
        """Tell all that a rank, this one by default, has failed. The first reason counts."""
        with contextlib.suppress(RuntimeError):  # the store has gone, and so the others know
            self.store.compare_set("failed", "", json.dumps([self.rank if rank is None else rank, reason]))

    def told(self) -> RankError | None:
        """What a process has told by `fail`."""
        if not self.store.check(["failed"]):
            return None
        rank, reason = json.loads(self.store.get("failed"))
        if self.rank == 0:
            self.store.set("heard", "1")
        return RankError(rank, reason)

    def heard(self, seconds: float) -> bool:
        """Whether rank 0 has heard what failed, or hears it soon."""
        with contextlib.suppress(RuntimeError):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if self.store.check(["heard"]):
                    return True
                time.sleep(10 * SLEEP)
        return False

    def wait_until(self, done: Callable[[], bool], what: str, absent: Callable[[], list[int]], deadline: float | None = None) -> None:
        """Poll until `done`. RankError if a process fails or ends meanwhile, or after the deadline: `absent` says who was waited for."""
        start = look = roll_call = time.monotonic()
        end = start + (self.deadline if deadline is None else deadline)
        while True:
            now = time.monotonic()
            with self._store_is_there():
                if done():
                    return
                if now > look + LOOK:
                    look = now
                    self._raise_told()
            if now > end:
                raise self._late(what, absent())
            if now > roll_call + PATIENCE:
                roll_call = now
                silent = [rank for rank in self._silent(PATIENCE) if self.store.check([f"joined/{rank}"])]
                if silent:
                    raise self._ended(silent)
            time.sleep(min(max(SLEEP, (now - start) / 50), 25 * SLEEP))

    def _raise_told(self) -> None:
        self._failure = self._failure or self.told()
        self.check()

    @contextlib.contextmanager
    def _store_is_there(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:  # DistError and its kinds
            self._failure = RankError(None, f"the process that keeps the common store has ended ({_first_line(error)})")
            raise self._failure from error

    def _late(self, what: str, absent: list[int]) -> RankError:
        who = "another rank" if not absent else _named(absent)
        reason = f"{who} did not come to {what} within {self.deadline:g} s: it hangs, or is much slower (PAGE4D_DEADLINE sets the time)"
        return self._lost(reason, absent)

    def _lost(self, reason: str, absent: list[int]) -> RankError:
        """The error after a broken connection, or after the deadline: what somebody told, or who does not answer any more."""
        silent = self._silent(GRACE)
        if self._failure is not None:
            return self._failure
        with self._store_is_there():
            never = [rank for rank in silent if not self.store.check([f"joined/{rank}"])]
        if never:
            return self._first(f"{_named(never)} did not call the model within {self.deadline:g} s: all ranks of a group must", never[0])
        return self._ended(silent) if silent else self._first(reason, absent[0] if absent else None)

    def _ended(self, silent: list[int]) -> RankError:
        reason = f"{_named(silent)} exited unexpectedly or does not respond: killed (by the system, if memory ran out) or stopped"
        return self._first(reason, silent[0])

    def _first(self, reason: str, rank: int | None) -> RankError:
        """The error that all raise: this one, unless another was told before."""
        with self._store_is_there():
            self.fail(reason, rank)
            self._failure = self._failure or self.told() or RankError(rank, reason)
        return self._failure

    def _silent(self, seconds: float) -> list[int]:
        """The ranks whose watcher does not answer in this time. Nobody is called silent once a failure has been told."""
        with self._store_is_there():
            call = self.store.add("roll calls", 1)
            end = time.monotonic() + seconds
            silent = [rank for rank in range(self.size) if rank != self.rank]
            while silent and time.monotonic() < end:
                self._failure = self._failure or self.told()
                if self._failure is not None:
                    return []
                silent = [rank for rank in silent if not self.store.check([f"here {call}/{rank}"])]
                time.sleep(10 * SLEEP)
        return silent


@dataclass
class Pending:
    """An exchange that has been started."""

    ranks: Ranks
    kind: str
    work: Any
    receive: Tensor
    send: Tensor  # must live until then

    def wait(self) -> Tensor:
        """What was received. On a GPU the current stream waits, elsewhere this process."""
        with stage(f"{EXCHANGE} {self.kind}"):
            return self._wait()

    def _wait(self) -> Tensor:
        ranks, start = self.ranks, time.monotonic()
        if ranks.device.type == "cuda":
            self.work.wait()
            ranks.check()
            return self.receive
        while True:
            try:
                self.work.wait(timedelta(seconds=LOOK))
                break
            except RuntimeError as error:
                if self.work.is_completed():  # either it came just after this wait had ended, or the connection broke
                    self._complete(error)
                    break
                with ranks._store_is_there():
                    ranks._raise_told()
                    ranks.store.set(f"waits/{ranks.rank}", f"{ranks.traffic[self.kind].exchanges} {self.kind}")
                if time.monotonic() - start > ranks.deadline:
                    raise self._late() from None
        ranks.traffic[self.kind].seconds += time.monotonic() - start
        return self.receive

    def _complete(self, error: RuntimeError) -> None:
        """Return if the exchange succeeded. RankError if not: a wait for what is complete raises what went wrong, if anything did."""
        try:
            self.work.wait(timedelta(seconds=LOOK))
        except RuntimeError as broken:
            raise self.ranks._lost(_first_line(broken), []) from error

    def _late(self) -> RankError:
        """Nobody came: those who do not wait at this same exchange."""
        ranks, here = self.ranks, f"{self.ranks.traffic[self.kind].exchanges} {self.kind}".encode()
        with ranks._store_is_there():
            keys = [(rank, f"waits/{rank}") for rank in range(ranks.size)]
            absent = [rank for rank, key in keys if not ranks.store.check([key]) or ranks.store.get(key) != here]
        return ranks._late(f"the exchange of {self.kind}", absent)


_known: weakref.WeakKeyDictionary[dist.ProcessGroup, Ranks] = weakref.WeakKeyDictionary()


def reason_of(error: BaseException) -> str:
    """An exception in one line, for the other processes."""
    if is_out_of_memory(error):
        return f"out of memory ({_first_line(error)})"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return _first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def deadline() -> float:
    """Seconds that one rank waits for another: PAGE4D_DEADLINE, or 300."""
    text = env.get("PAGE4D_DEADLINE", f"{DEADLINE:g}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise env.VariableError(f"PAGE4D_DEADLINE={text!r} is not a time: use seconds, such as 300")
    return seconds


def _watch(reference: weakref.ref[Ranks], stop: threading.Event) -> None:
    """Answer roll calls, and end what waits on a GPU for a process that has failed."""
    answered = 0
    while not stop.wait(LOOK):
        ranks = reference()
        if ranks is None:
            return
        try:
            calls = int(ranks.store.get("roll calls")) if ranks.store.check(["roll calls"]) else 0
            for call in range(answered + 1, calls + 1):
                ranks.store.set(f"here {call}/{ranks.rank}", "1")
            answered = calls
            told = ranks.told()
        except RuntimeError:  # the store has gone
            return
        if told is not None and ranks._failure is None:
            ranks._failure = told
            if ranks.device.type == "cuda":
                ranks.group.abort()
                return
        del ranks


def _stop(stop: threading.Event, watcher: threading.Thread) -> None:
    stop.set()
    if watcher is not threading.current_thread():
        watcher.join(30 * LOOK)  # Python must not end while it is in the store
