"""A trial is one small problem with a known answer; a timed call is one whose time counts. `trials/<op>.py` makes them.

Such a module has `variant(setting)`, what the op judges apart from dtype and direction, `trials(setting, draw)` and `timed(setting)`.
"""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .classes import DTYPES, FORWARD, TRAINING, part

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What a run looks at. `training`: with gradients."""

    device: str
    dtype: torch.dtype
    training: bool = False
    head_dim: int = 64


def trials_of(op: str) -> ModuleType:
    return importlib.import_module(f".trials.{op}", __package__)


def settings(op: str, device: str, dtypes: Sequence[str], directions: Sequence[str], head_dims: Sequence[int]) -> dict[str, Setting]:
    """What a run looks at, by part: forward first, as it is more important. An op without head dims is looked at once."""
    found: dict[str, Setting] = {}
    variant, named = trials_of(op).variant, {name: dtype for dtype, name in DTYPES.items()}
    for direction, dtype, head_dim in itertools.product(sorted(directions, key=(FORWARD, TRAINING).index), dtypes, head_dims):
        setting = Setting(device, named[dtype], direction == TRAINING, head_dim)
        found.setdefault(part(dtype, direction, variant(setting)), setting)
    return found


@dataclass(frozen=True)
class Expected:
    """The results in float64, those of plain PyTorch in the tested dtype, and absolute tolerances by name on top of the budget."""

    oracle: Results
    plain: Results
    slack: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    name: str  # in words
    problem: Any  # as the registry describes it
    run: Callable[[str], Results]  # the results of a backend: outputs and, in training, gradients
    expected: Callable[[], Expected]
    inputs: tuple[Tensor, ...] = ()  # that no backend may change


@dataclass(frozen=True)
class Timed:
    problem: Any
    run: Callable[[str], object]  # one call of a backend


@dataclass
class Draw:
    """Sizes drawn at random, so that no backend can be right for the battery's sizes only."""

    source: random.Random
    lengths: list[int] = field(default_factory=list)  # of the trials so far, in tokens, for the record

    def size(self, low: int, high: int) -> int:
        return self.source.randint(low, high)

    def seed(self) -> int:
        return self.size(0, 1 << 30)


def at_an_odd_address(x: Tensor) -> Tensor:
    """A copy that begins one element into its memory, where loads of several elements at once are not aligned."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def upstream_of(x: Tensor, seed: int = 1) -> Tensor:
    """A random gradient for `x`. Its values are those of bf16, so that it is the same for outputs of every dtype."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(x)


def differentiate(outputs: Sequence[Tensor], leaves: dict[str, Tensor]) -> Results:
    """Gradients by name, of a fixed random combination of the outputs."""
    upstream = [upstream_of(x, seed) for seed, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, materialize_grads=True)
    return {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def compared(
    names: Sequence[str],
    tensors: dict[str, Tensor],
    leaves: Sequence[str],
    call: Callable[[dict[str, Tensor], str], Sequence[Tensor]],
    tolerance: float = 0.0,
) -> tuple[Callable[[str], Results], Callable[[], Expected]]:
    """`run` and `expected` of an op whose reference takes any dtype: the oracle is the reference on the tensors upcast to float64.

    Args:
        names: of the outputs. leaves: the tensors that get gradients; none outside training.
        call: `call(tensors, backend)` computes the outputs.
        tolerance: absolute slack of each result, relative to its largest value.
    """

    def results(given: dict[str, Tensor], backend: str) -> Results:
        mine = {name: x.detach().requires_grad_(name in leaves) for name, x in given.items()}
        with torch.set_grad_enabled(bool(leaves)):
            outputs = call(mine, backend)
            found = dict(zip(names, (x.detach() for x in outputs), strict=True))
            return found | (differentiate(outputs, {name: mine[name] for name in leaves}) if leaves else {})

    def expected() -> Expected:
        oracle = results({name: x.double() for name, x in tensors.items()}, "reference")
        slack = {name: tolerance * float(x.abs().max()) for name, x in oracle.items()}
        return Expected(oracle, results(tensors, "reference"), slack)

    return lambda backend: results(tensors, backend), expected
