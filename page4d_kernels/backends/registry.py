"""Which backend serves an op. An op describes its arguments as a *problem*, and backends say why they cannot serve it.

A backend named by the argument, `use_backend` or the op's environment variable (in this order) never falls back: it serves or raises
with its reasons. "auto" takes the fastest backend that has qualified on this machine for the problem's class (docs/qualification.md). For
a class without a record, it takes the first backend in the registry's order without a reason against it. It logs the choice once.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import env
from ..qualify import record
from ..qualify.classes import class_of

logger = logging.getLogger("page4d_kernels")

AUTO = "auto"
_registries: dict[str, Registry] = {}
_overrides: dict[str, list[list[str]]] = {}  # per op, the open `use_backend` blocks; each is a list of one name


class BackendError(RuntimeError):
    """The chosen backend cannot serve the problem, or no backend can. The message lists the reasons and the backends that could."""


def _available() -> list[str]:
    return []


def _no_reason(problem: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. Three functions return a list of reasons in words; an empty list means no objection.

    With a `backward`, both run inside the op's torch.library operator, which supplies autograd and the fake implementation.
    Without one, `forward` must be differentiable PyTorch and is called directly.
    """

    name: str
    summary: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    unsupported: Callable[[Any], list[str]] = _no_reason  # why it cannot serve this problem
    unavailable: Callable[[], list[str]] = _available  # why it cannot serve any problem on this machine
    auto_skips: Callable[[Any], list[str]] = _no_reason  # why "auto" tries the next backend although this one could serve
    automatic: bool = True  # False: "auto" never takes it, such as a baseline; `page4d qualify` judges it only by name


def _check(backend: Backend) -> None:
    """Raise ValueError for what could not be chosen by name or called later."""
    if not isinstance(backend, Backend):
        raise ValueError(f"a backend must be a page4d_kernels.Backend(name, summary, forward), not {backend!r}")
    if not isinstance(backend.name, str) or not backend.name.isidentifier() or backend.name == AUTO:
        raise ValueError(f"a backend's name must be letters, digits and underscores, and not 'auto': {backend.name!r} cannot be chosen")
    for role in ("forward", "backward", "unsupported", "unavailable", "auto_skips"):
        function = getattr(backend, role)
        if not callable(function) and not (role == "backward" and function is None):
            raise ValueError(f"backend {backend.name!r}: {role} must be a function, not {function!r}")


def _words(function: Callable[..., list[str]], *problem: Any) -> list[str]:
    """The reasons that a backend's function gives. One that fails is a reason against its backend alone, not an error of the others."""
    try:
        reasons = function(*problem)
    except Exception as error:
        return [f"its own check failed with {type(error).__name__}: {error}"]
    return reasons if isinstance(reasons, list) else [f"its own check returned {reasons!r} instead of a list of reasons"]


class Registry:
    """The backends of one op."""

    def __init__(self, op: str, variable: str, order: tuple[str, ...], safe: tuple[str, ...], typical: Callable[[str], Any]):
        self.op, self.variable, self.order, self.safe, self.typical = op, variable, order, safe, typical
        self._backends: dict[str, Backend] = {}
        self._logged: set[str] = set()
        self.calls: Counter[str] = Counter()  # by backend, for reports

    def register(self, backend: Backend) -> None:
        _check(backend)
        if backend.name in self._backends:
            raise ValueError(f"{self.op} already has a backend named {backend.name!r}")
        self._backends[backend.name] = backend

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._backends.values())

    def get(self, name: str) -> Backend:
        if name not in self._backends:
            raise BackendError(self._unknown(name))
        return self._backends[name]

    def _unknown(self, name: str) -> str:
        return f"unknown backend {name!r} for {self.op}: choose one of auto, {', '.join(self._backends)}"

    def reasons(self, name: str, problem: Any) -> list[str]:
        """Why `name` cannot serve `problem`, in words. Empty if it can."""
        backend = self.get(name)
        return _words(backend.unavailable) or _words(backend.unsupported, problem)

    def usable(self, problem: Any) -> list[str]:
        return [name for name in self._backends if not self.reasons(name, problem)]

    def requested(self) -> str:
        """The name set by `use_backend` or the environment variable; "auto" if neither is set."""
        blocks = _overrides.get(self.op)
        if blocks:
            return blocks[-1][0]
        name = env.get(self.variable) or AUTO
        if name != AUTO and name not in self._backends:
            raise BackendError(f"{self.variable}: {self._unknown(name)}")
        return name

    def choose(self, problem: Any, name: str | None = None) -> Backend:
        """The backend that serves `problem`: `name` > `use_backend` > environment variable > the automatic order."""
        chosen = self._choose(problem, name)
        if not torch.compiler.is_compiling():
            self.calls[chosen.name] += 1
        return chosen

    def _choose(self, problem: Any, name: str | None) -> Backend:
        name = self.requested() if name is None else name
        if name != AUTO:
            reasons = self.reasons(name, problem)
            if reasons:
                could = ", ".join(self.usable(problem)) or "none"
                raise BackendError(f"{self.op}: backend {name!r} cannot serve this: {'; '.join(reasons)} (backends that could: {could})")
            return self.get(name)
        advice = record.advice(self.op, problem.device, class_of(problem))
        refused: list[str] = []
        factors = dict(advice.faster)
        rest = [name for name in self.order if name in self.safe or name not in advice.compared]
        for candidate in (*self._automatic(factors), *rest):
            reasons = self.reasons(candidate, problem)
            if candidate not in self.safe and candidate not in factors:
                failed = ["it failed here: see `page4d info`"] if candidate in advice.failed else []
                reasons = failed or reasons or _words(self.get(candidate).auto_skips, problem)
            if not reasons:
                self._log_once(candidate, refused, factors.get(candidate))
                return self.get(candidate)
            refused.append(f"{candidate}: {'; '.join(reasons)}")
        raise BackendError(f"{self.op}: no backend can serve this: {' | '.join(refused)}")

    def qualified(self, problem: Any) -> list[str]:
        """The backends that were faster than the safe one in the problem's class on this machine and serve it, the fastest first."""
        faster = record.advice(self.op, problem.device, class_of(problem)).faster
        return [name for name in self._automatic(dict(faster)) if not self.reasons(name, problem)]

    def _automatic(self, names: Iterable[str]) -> list[str]:
        """Those that exist here and that "auto" may take."""
        return [name for name in names if name in self._backends and self._backends[name].automatic]

    def safe_choice(self, problem: Any) -> str:
        """The backend that "auto" takes where nothing faster has qualified: PyTorch's own."""
        for name in self.safe:
            if not self.reasons(name, problem):
                return name
        raise BackendError(f"{self.op}: none of {', '.join(self.safe)} can serve this")

    def _log_once(self, name: str, refused: list[str], factor: float | None) -> None:
        if torch.compiler.is_compiling():  # a logging call would break the graph
            return
        why = "" if factor is None else f", which was {factor:.2f} times as fast as the safe backend on this machine"
        message = f"{self.op}: auto takes {name}{why}" + (f" (not {' | '.join(refused)})" if refused else "")
        if message not in self._logged:
            self._logged.add(message)
            logger.info(message)


def declare(op: str, variable: str, order: tuple[str, ...], safe: tuple[str, ...], typical: Callable[[str], Any]) -> Registry:
    """Create the registry of a new op, for `use_backend` and `info`.

    Args:
        op: name of the op.
        variable: its environment variable.
        order: the backends that "auto" tries for a class without a record, in this order.
        safe: those of them that need no proof, PyTorch's own. Others are compared with them, and "auto" falls back to them.
        typical: makes the problem of an inference call at the official size on a given device, such as "cuda". Used in reports.
    """
    env.VARIABLES[variable] = f"backend of {op}: auto (default) or a name from `page4d info`"
    _registries[op] = Registry(op, variable, order, safe, typical)
    return _registries[op]


def register_backend(backend: Backend, op: str = "mask_attention") -> None:
    """Add a backend to an op. Code outside this package may call it. The backend serves by name; "auto" takes it where it has qualified.

    Raises:
        BackendError: the op does not exist. ValueError: the op has a backend of this name, or the name or a function is unusable.
    """
    _registry(op).register(backend)


def registries() -> dict[str, Registry]:
    """Every op's registry, by op name."""
    return dict(_registries)


@contextlib.contextmanager
def use_backend(name: str, op: str = "mask_attention") -> Iterator[None]:
    """Within the block, `op` is served by `name` ("auto" for the automatic choice) unless a call names another.

    The block applies to all threads of the process, because autograd recomputes checkpointed layers in other threads.
    """
    registry = _registry(op)
    if name != AUTO:
        registry.get(name)
    block = [name]
    blocks = _overrides.setdefault(op, [])
    blocks.append(block)
    try:
        yield
    finally:  # by identity, because blocks of several threads may end in any order
        blocks[:] = [other for other in blocks if other is not block]


def is_backend_supported(name: str, problem: Any, op: str = "mask_attention") -> bool:
    """Whether `name` can serve `problem`; `registries()[op].reasons(name, problem)` says why not."""
    return not _registry(op).reasons(name, problem)


def _registry(op: str) -> Registry:
    if op not in _registries:
        raise BackendError(f"unknown op {op!r}: choose one of {', '.join(_registries)}")
    return _registries[op]
