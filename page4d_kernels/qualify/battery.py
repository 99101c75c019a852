"""Judges one backend on the trials of its op: right, complete, repeatable.

A result is right if it stays within the error budget of `testing.py`. The error of an output must also not lie along the output: a factor
of 0.99 hides below the rounding of bf16 in any one value, but not in the sum over all of them. Gradients are exempt from this, as that of
the gate is a small difference of large terms.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..backends.registry import Registry
from ..testing import assert_within_budget
from .classes import part_of
from .trial import Results, Trial

ROUNDINGS = 16 * torch.finfo(torch.float32).eps  # on top of the budget: among many random problems, some meet the tail of the errors
REPEATS = 3  # calls after the first that must give the same bits


class Disqualified(Exception):
    """The reason in words. `part` is the dtype and direction of the trial."""

    part = ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory. That says nothing about a backend."""
    known = ("out of memory", "allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in known)


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch fills what it allocates with NaN, so that what a kernel leaves unwritten shows. Only the warnings of this mode are silenced."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)


At = Callable[[str, bool], None]


def judge(registry: Registry, backend: str, trials: Iterable[Trial], at: At) -> tuple[list[str], list[str]]:
    """The dtypes and directions of the trials that `backend` serves, all of them passed, and why it refuses others.

    `at` hears the name of each trial twice: before its answers are computed, which is safe, and before the backend runs.

    Raises:
        Disqualified: a result is wrong, or a call failed.
    """
    served: list[str] = []
    refusals: list[str] = []
    for trial in trials:
        reasons = registry.reasons(backend, trial.problem)
        refusals += reasons
        if not reasons:
            try:
                _judge(backend, trial, at)
                if not served:  # the same memory with other contents: nothing may be remembered by address, or written again
                    given = {x.untyped_storage().data_ptr() for x in trial.inputs}  # what is passed through may change with them
                    earlier = {name: x for name, x in trial.run(backend).items() if x.untyped_storage().data_ptr() not in given}
                    copies = {name: x.clone() for name, x in earlier.items()}
                    with torch.no_grad():
                        trial.inputs[0].neg_()
                    _judge(backend, trial, at)
                    if not all(torch.equal(x, copies[name]) for name, x in earlier.items()):
                        raise Disqualified(f"{trial.name}: a later call changes the results of an earlier one")
            except Disqualified as error:
                error.part = part_of(trial.problem)
                raise
            served.append(part_of(trial.problem))
    return list(dict.fromkeys(served)), refusals


def _judge(backend: str, trial: Trial, at: At) -> None:
    at(trial.name, True)
    before, expected = [x.clone() for x in trial.inputs], trial.expected()
    at(trial.name, False)
    first = _call(backend, trial, "the first call")
    with unwritten_memory_is_nan():
        poisoned = _call(backend, trial, "a call with NaN in unwritten memory")
    for name, result in first.items():
        if name not in expected.oracle:
            raise Disqualified(f"{trial.name}: it returned {name!r}, which nobody asked for")
        oracle, plain = expected.oracle[name], expected.plain[name]
        slack = expected.slack.get(name, 0.0) + ROUNDINGS * float(oracle.abs().max())
        if (result.shape, result.dtype, result.device) != (plain.shape, plain.dtype, plain.device):
            raise Disqualified(f"{trial.name}: {name} is {_kind(result)} instead of {_kind(plain)}")
        if poisoned[name].isnan().any() and not result.isnan().any():
            raise Disqualified(f"{trial.name}: {name} has values that were never written")
        try:
            assert_within_budget(name, result, oracle, plain, slack=slack)
        except AssertionError as error:
            raise Disqualified(f"{trial.name}: {error}") from None
        along = _along(result, oracle)
        if not name.startswith("gradient") and abs(along) > 2 * abs(_along(plain, oracle)) + _systematic(result, oracle, slack):
            raise Disqualified(f"{trial.name}: {name} is {along:+.2%} off on average")
    for repeat in range(REPEATS):
        with torch.inference_mode(repeat == 0 and not trial.problem.needs_grad):
            again = _call(backend, trial, f"call {repeat + 3}")
        for name, result in first.items():
            if not torch.equal(again[name], result):
                raise Disqualified(f"{trial.name}: {name} is not repeatable: call {repeat + 3} gave other bits")
    if not all(torch.equal(x, y) for x, y in zip(trial.inputs, before, strict=True)):
        raise Disqualified(f"{trial.name}: it changes its inputs")


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _call(backend: str, trial: Trial, which: str) -> Results:
    """The results. Waits for the device, so that an error belongs to its call."""
    try:
        found = {name: x.clone() for name, x in trial.run(backend).items()}  # a backend may use its memory again
        if any(x.is_cuda for x in found.values()):
            torch.cuda.synchronize()
        return found
    except Exception as error:
        if is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        raise Disqualified(f"{trial.name}: {which} failed with {type(error).__name__}: {lines[0]}") from None


def _along(result: Tensor, oracle: Tensor) -> float:
    """The part of the error that lies along the result, relative to it."""
    size = float(oracle.square().sum())
    return float(((result.double() - oracle) * oracle).sum()) / size if size else 0.0


def _systematic(result: Tensor, oracle: Tensor, slack: float) -> float:
    """What roundings may leave of that: half a rounding of the dtype, and what the slack allows in the mean."""
    mean = float(oracle.square().mean().sqrt())
    return max(torch.finfo(result.dtype).eps / 2, 1e-5) + (slack / mean / result.numel() ** 0.5 if mean else 0.0)
