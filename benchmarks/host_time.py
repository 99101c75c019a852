"""CPU time that the Triton ops take on the host: `python -m benchmarks.host_time`. It needs no GPU, and uses none.

With few frames kernels are short, and the host is the limit. Here every call goes through the whole launch path with the dry-run driver,
which records launches instead of running them. What only a GPU costs is left out: encoding tensor maps, the driver's launch, its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from page4d_kernels import TokenLayout, env, mask_attention, mask_head, qk_norm_rope, registries, residual_norm, rope_tables
from page4d_kernels.backends.mask_attention.problem import AttentionArgs
from page4d_kernels.ops import _checks
from page4d_kernels.testing import attention_inputs
from page4d_kernels.triton import launcher, target
from page4d_kernels.triton.dryrun import Launch, dry_run

GRID, SPECIAL, CHANNELS, HIDDEN, HEADS = (6, 8), 5, 64, 16, 2  # small, so that what is computed on CPU tensors takes no time
Calls = dict[str, Callable[[], object]]


@contextlib.contextmanager
def as_on_a_gpu(capability: int) -> Iterator[list[Launch]]:
    """CPU tensors take the path of tensors on a GPU: recorded launches, and no check that would read values."""
    patches: tuple[Any, ...] = (
        mock.patch.object(target, "device_type", lambda: "cpu"),
        mock.patch.object(target, "unavailable", lambda: []),
        mock.patch.object(_checks, "values_can_be_read", lambda x: env.flag("PAGE4D_DEBUG")),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield stack.enter_context(dry_run(capability)).launches


def _both(op: Callable[..., Any], tensors: list[torch.Tensor], *rest: Any, **options: Any) -> Calls:
    """The operator alone, and followed by its backward."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    first = op(*inputs, *rest, **options)
    gradients = [torch.zeros_like(x) for x in ((first,) if isinstance(first, torch.Tensor) else first)]

    def training() -> None:
        out = op(*inputs, *rest, **options)
        torch.autograd.grad((out,) if isinstance(out, torch.Tensor) else out, inputs, gradients, allow_unused=True)

    return {"operator": functools.partial(op, *tensors, *rest, **options), "operator and its backward": training}


def calls() -> dict[str, Calls]:
    """By op: the launch function of each direction, and the operator. The time on the host hardly depends on the size."""
    triton = {op: registry.get("triton") for op, registry in registries().items()}
    layout = TokenLayout(1, GRID[0] * GRID[1] + SPECIAL, SPECIAL)
    half = torch.bfloat16
    found: dict[str, Calls] = {}

    def add(op: str, forward: tuple[Any, ...], backward: tuple[Any, ...], operator: Calls) -> None:
        backend = triton[op]
        assert backend.backward is not None
        found[op] = {"forward": functools.partial(backend.forward, *forward), "backward": functools.partial(backend.backward, *backward)}
        found[op] |= operator

    inputs = attention_inputs(layout, heads=HEADS, dtype=half, packed=True)
    args = AttentionArgs(inputs.q, inputs.k, inputs.v, inputs.query_gate, inputs.key_bias, layout, 0.125)
    out, lse = triton["mask_attention"].forward(args)
    operator = _both(mask_attention, [x for x in inputs.tensors() if x is not None], layout=layout, backend="triton")
    add("mask_attention", (args,), (args, out, lse, torch.zeros_like(out), None), operator)

    tokens = torch.zeros(1, 1, layout.tokens, CHANNELS, dtype=half)
    shapes = [(CHANNELS, 1, 3, 3), (CHANNELS,), (HIDDEN, CHANNELS, 1, 1), (HIDDEN,), (1, HIDDEN, 1, 1), (1,)]
    weights = [torch.zeros(shape) for shape in shapes]
    head = functools.partial(mask_head, tokens, grid=GRID, special_tokens=SPECIAL, backend="triton")
    head_args = (tokens, weights, GRID, SPECIAL)
    add("mask_head", head_args, (torch.zeros(1, layout.tokens), *head_args), _both(head, weights))

    qkv, vector, tables = torch.zeros(1, layout.tokens, 3, HEADS, 64, dtype=half), torch.zeros(64), rope_tables(GRID, 64)
    q, k = triton["qk_norm_rope"].forward(qkv, *[vector] * 4, *tables, GRID, SPECIAL, 1e-5)
    operator = _both(qk_norm_rope, [qkv, *[vector] * 4], *tables, grid=GRID, special_tokens=SPECIAL, backend="triton")
    rest = (*tables, GRID, SPECIAL, 1e-5)
    add("qk_norm_rope", (qkv, *[vector] * 4, *rest), (q, k, qkv, vector, vector, *rest), operator)

    x, branch, vector = (torch.zeros(1, layout.tokens, CHANNELS) for _ in range(3))
    x, branch, vector = x, branch.to(half), vector[0, 0]
    total, normal = triton["residual_norm"].forward(x, branch, *[vector] * 3, 1e-5, half)
    operator = _both(residual_norm, [x, branch, *[vector] * 3], dtype=half, backend="triton")
    add("residual_norm", (x, branch, *[vector] * 3, 1e-5, half), (total, normal, total, branch, vector, vector, 1e-5), operator)
    return found


def plain_launch(kernel: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], numbers: tuple[Any, ...], **constants: Any) -> None:
    """What `launcher.launch` replaces."""
    kernel[grid](*tensors, *numbers, **constants)


def microseconds(call: Callable[[], object], recorded: list[Launch], seconds: float) -> tuple[float, float]:
    """Median CPU time of a call, and of the same call with Triton's own launches, taken in turn."""
    launches = (launcher.launch, plain_launch)
    samples: list[list[int]] = [[] for _ in launches]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 10:
        for launch, times in zip(launches, samples, strict=True):
            with mock.patch.object(launcher, "launch", launch):
                start = time.thread_time_ns()
                call()
                times.append(time.thread_time_ns() - start)
            recorded.clear()
    ours, plain = (statistics.median(times) / 1e3 for times in samples)
    return ours, plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.host_time")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table (default 2)")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU whose path is taken (default 90)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("Microseconds of CPU time per call, median: as it is, and with Triton's own launches.\n")
    print(f"| op | call | as it is | Triton's |\n|{'---|' * 4}")
    with as_on_a_gpu(args.capability) as recorded:
        for op, variants in calls().items():
            for name, call in variants.items():
                ours, plain = microseconds(call, recorded, args.seconds)
                print(f"| {op} | {name} | {ours:.0f} | {plain:.0f} |", flush=True)


if __name__ == "__main__":
    main()
