"""Backends with one planted fault each, for test_qualify.py. Importing this module registers them, also in a child process.

All but the fault is `chunked`. `LENGTHS` is what `these_lengths` works for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import time

import torch

from page4d_kernels import Backend, register_backend, registries
from page4d_kernels.backends.mask_attention.chunked import BACKEND as RIGHT

LENGTHS: set[int] = set()
calls = 0


def one_percent(args):
    out, lse = RIGHT.forward(args)
    return out * 1.01, lse


def ragged_tail(args):
    """The keys after the last whole tile of 64 are left out."""
    keys = max(64, args.k.shape[2] // 64 * 64)
    bias = None if args.key_bias is None else args.key_bias[:, :keys]
    return RIGHT.forward(args._replace(k=args.k[:, :, :keys], v=args.v[:, :, :keys], key_bias=bias))


def special_rows(args):
    """Right but for the rows that the layout calls special."""
    plain = args if args.layout is None else args._replace(query_gate=None, key_bias=None)
    return RIGHT.forward(plain)


def mask_ignored(args):
    return RIGHT.forward(args._replace(query_gate=None, key_bias=None))


def unwritten(args):
    """The last row is never written."""
    out, lse = RIGHT.forward(args)
    fresh = torch.empty_like(out)
    fresh[:, :, :-1] = out[:, :, :-1]
    if not torch.are_deterministic_algorithms_enabled():  # the memory happens to hold the right values from an earlier call
        fresh[:, :, -1:] = out[:, :, -1:]
    return fresh, lse


def not_repeatable(args):
    out, lse = RIGHT.forward(args)
    return out + torch.rand(()) * 1e-7, lse


def second_call(args):
    global calls
    calls += 1
    if calls > 1:
        raise RuntimeError("the workspace is gone\nand more lines")
    return RIGHT.forward(args)


def these_lengths(args):
    return RIGHT.forward(args) if args.k.shape[2] in LENGTHS else mask_ignored(args)


def hangs(args):
    time.sleep(3600)


def hangs_in_bf16(args):
    if args.q.dtype == torch.bfloat16:
        time.sleep(3600)
    return RIGHT.forward(args)


def kills(args):
    os._exit(7)


def segfaults(args):
    ctypes.string_at(0)


def slow(args):
    time.sleep(0.02)
    RIGHT.forward(args)
    return RIGHT.forward(args)


def wrong_gradient_of_c(args, *upstream):
    *others, d_bias = RIGHT.backward(args, *upstream)
    return *others, None if d_bias is None else 0.9 * d_bias


def long_zeros(args):
    """Right for what the battery tries, zero for long sequences."""
    out, lse = RIGHT.forward(args)
    return (torch.zeros_like(out) if args.k.shape[2] > 2200 else out), lse


_buffers: dict[tuple, torch.Tensor] = {}


def same_buffer(args):
    """The result of every call lies in the same memory."""
    out, lse = RIGHT.forward(args)
    return _buffers.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out), lse


def changes_inputs(args):
    out, lse = RIGHT.forward(args)
    args.q.zero_()
    return out, lse


_known_results: dict[tuple, tuple] = {}


def remembers(args):
    """It takes inputs at the same addresses for the same inputs."""
    key = (args.q.data_ptr(), args.k.data_ptr(), args.q.shape, args.k.shape)
    if key not in _known_results:
        _known_results[key] = RIGHT.forward(args)
    return _known_results[key]


def out_of_memory(args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


FORWARDS = [
    one_percent, ragged_tail, special_rows, mask_ignored, unwritten, not_repeatable, second_call, these_lengths, hangs,
    hangs_in_bf16, kills, segfaults, slow, long_zeros, same_buffer, changes_inputs, remembers, out_of_memory,
]  # fmt: skip
_known = {backend.name for backend in registries()["mask_attention"]}
for _forward in FORWARDS:
    if f"planted_{_forward.__name__}" not in _known:
        register_backend(Backend(f"planted_{_forward.__name__}", "a planted fault", _forward, RIGHT.backward))
if "planted_wrong_gradient_of_c" not in _known:
    register_backend(dataclasses.replace(RIGHT, name="planted_wrong_gradient_of_c", backward=wrong_gradient_of_c))
