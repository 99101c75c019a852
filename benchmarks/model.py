"""The whole model and its parts at the official size, against the official arithmetic.

The official release is not part of this repository; its arithmetic is: weights in fp32 under autocast, bias by padded heads, QK-norm and
RoPE one operation after the other, every tensor whole; heads in fp32, as it runs them on a GPU (its autocast on a CPU includes them).
Weights are random, of the official shapes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from page4d.config import preset
from page4d.layers import Block, Modulation, Rope
from page4d.model import Page4D
from page4d_kernels import TokenLayout, rope_tables, use_backend
from page4d_kernels.reference import accumulation_dtype

SIZE = (336, 518)
SMALL = (56, 84)
OUTPUTS = {"trunk": ("camera",), "model": ("camera", "depth", "points")}
GRID, SPECIAL = (SIZE[0] // 14, SIZE[1] // 14), 5


@dataclass(frozen=True)
class Given:
    """Images for a preset, the dtype of the trunk's products, and the memory it may take."""

    preset: str
    images: Tensor
    dtype: torch.dtype
    outputs: tuple[str, ...]
    budget: int | None = None

    def to(self, dtype: torch.dtype) -> Given:
        return Given(self.preset, self.images.to(dtype), dtype, self.outputs, self.budget)


def make_inputs(op: str, frames: int, dtype: torch.dtype, device: str, small: bool) -> Given:
    """`small`: all 24 layers at width 128, three frames of 56 x 84 in pieces of one, for the gate."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3 if small else frames, 3, *(SMALL if small else SIZE), generator=generator)
    return Given("tiny" if small else "page4d-mask", images.to(device), dtype, OUTPUTS[op], 0 if small else None)


@functools.lru_cache(maxsize=3)
def random_model(name: str, products: torch.dtype, everything: torch.dtype, device: str) -> Page4D:
    with torch.device("meta"):
        model = Page4D(preset(name).replace(track=None))
    model.to_empty(device=device)
    model.aggregator.reset_buffers()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.3 if key.endswith("gamma") else float("norm" in key and key.endswith("weight")))
    return model.to(device, everything).eval().requires_grad_(False).set_compute_dtype(products)


@contextlib.contextmanager
def as_official(device: str, dtype: torch.dtype) -> Iterator[None]:
    """The official arithmetic for what runs inside."""
    low = dtype != torch.float32
    with contextlib.ExitStack() as stack:
        for op, backend in (("mask_attention", "sdpa_augmented"), ("mask_head", "reference"), ("qk_norm_rope", "reference")):
            stack.enter_context(use_backend(backend, op))
        stack.enter_context(torch.autocast(device, dtype if low else torch.bfloat16, enabled=low))
        yield


def our_model(given: Given) -> Page4D:
    everything = torch.float64 if given.dtype == torch.float64 else torch.float32
    return random_model(given.preset, given.dtype, everything, given.images.device.type)


def official_model(given: Given) -> Page4D:
    return random_model(given.preset, torch.float32, torch.float32, given.images.device.type)


MODELS = {"page4d": our_model, "official arithmetic": official_model}  # by variant


def ours(given: Given) -> Tensor:
    model = our_model(given)
    with torch.inference_mode():
        return joined(model(given.images, outputs=given.outputs, memory_budget=given.budget).tensors())


def official_arithmetic(given: Given) -> Tensor:
    model = official_model(given)
    with (
        as_official(given.images.device.type, given.dtype),
        torch.enable_grad(),
    ):  # whole tensors, and torch's own products in linear layers: no parameter asks for a gradient, so none is made
        return joined(model(given.images, outputs=given.outputs).tensors())


def joined(outputs: dict[str, Tensor]) -> Tensor:
    """The outputs in one vector, each at the same weight."""
    found = [outputs[name].float() for name in ("pose_enc", "depth", "world_points") if name in outputs]
    return torch.cat([value.flatten() / value.norm() for value in found])


# --- one masked global block ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockGiven:
    """Tokens (1, N, 1024) in fp32, and the dtype of the products."""

    x: Tensor
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> BlockGiven:
        return BlockGiven(self.x.detach().to(dtype), dtype)


def make_block_inputs(frames: int, dtype: torch.dtype, device: str) -> BlockGiven:
    tokens = frames * (SPECIAL + GRID[0] * GRID[1])
    return BlockGiven(torch.randn(1, tokens, 1024, generator=torch.Generator().manual_seed(0)).to(device), dtype)


@functools.lru_cache(maxsize=3)
def random_block(products: torch.dtype, everything: torch.dtype, device: str) -> Block:
    torch.manual_seed(0)
    block = Block(1024, 16, 4, qk_norm=True, scale_init=0.3).to(device, everything)
    for part in (block.attn.qkv, block.attn.proj, block.mlp):
        part.to(products)
    return block.requires_grad_(False)


def _run_block(block: Block, given: BlockGiven) -> Tensor:
    x = given.x
    acc = accumulation_dtype(x.dtype)
    per_frame = SPECIAL + GRID[0] * GRID[1]
    layout = TokenLayout(x.shape[1] // per_frame, per_frame, SPECIAL)
    tables = rope_tables(GRID, 64, device=x.device, dtype=acc)
    generator = torch.Generator().manual_seed(1)
    bias = torch.rand(1, layout.tokens, generator=generator).to(x.device, acc) - 0.5
    gate = layout.only_special(torch.full((1, layout.tokens), 64.0, device=x.device, dtype=acc))
    return block(x, Rope(*tables, GRID, SPECIAL), Modulation(gate, bias, layout))


def our_block(given: BlockGiven) -> Tensor:
    return _run_block(random_block(given.dtype, given.x.dtype, given.x.device.type), given)


def official_block(given: BlockGiven) -> Tensor:
    with as_official(given.x.device.type, given.dtype):
        return _run_block(random_block(torch.float32, torch.float32, given.x.device.type), given)
