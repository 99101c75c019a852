"""The whole model and its parts at the official size, against the official arithmetic.

The official release is not part of this repository, but its arithmetic is reproduced here: fp32 weights under autocast, the bias in a
padded head dimension, unfused QK-norm and RoPE, no chunks. The heads run in fp32, as the official release runs them on a GPU (on a CPU,
its autocast includes them). The weights are random and have the official shapes.
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

from .sizes import GRID, SIZE, SPECIAL

SMALL = (56, 84)
OUTPUTS = {"trunk": ("camera",), "model": ("camera", "depth", "points")}


@dataclass(frozen=True)
class ModelInputs:
    """Images for a preset, the dtype of the trunk's matmuls, and the memory budget."""

    preset: str
    images: Tensor
    dtype: torch.dtype
    outputs: tuple[str, ...]
    budget: int | None = None

    def to(self, dtype: torch.dtype) -> ModelInputs:
        return ModelInputs(self.preset, self.images.to(dtype), dtype, self.outputs, self.budget)


def make_inputs(op: str, frames: int, dtype: torch.dtype, device: str, small: bool) -> ModelInputs:
    """`small`, for the gate: all 24 layers at width 128, three frames of 56 x 84, one frame per chunk."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3 if small else frames, 3, *(SMALL if small else SIZE), generator=generator)
    return ModelInputs("tiny" if small else "page4d-mask", images.to(device), dtype, OUTPUTS[op], 0 if small else None)


@functools.lru_cache(maxsize=3)
def random_model(name: str, compute_dtype: torch.dtype, dtype: torch.dtype, device: str) -> Page4D:
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
    return model.to(device, dtype).eval().requires_grad_(False).set_compute_dtype(compute_dtype)


@contextlib.contextmanager
def as_official(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Use the official arithmetic inside the block."""
    low = dtype != torch.float32
    with contextlib.ExitStack() as stack:
        for op, backend in (("mask_attention", "sdpa_augmented"), ("mask_head", "reference"), ("qk_norm_rope", "reference")):
            stack.enter_context(use_backend(backend, op))
        stack.enter_context(torch.autocast(device, dtype if low else torch.bfloat16, enabled=low))
        yield


def our_model(inputs: ModelInputs) -> Page4D:
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return random_model(inputs.preset, inputs.dtype, dtype, inputs.images.device.type)


def official_model(inputs: ModelInputs) -> Page4D:
    return random_model(inputs.preset, torch.float32, torch.float32, inputs.images.device.type)


MODELS = {"page4d": our_model, "official arithmetic": official_model}  # by name of the variant


def ours(inputs: ModelInputs) -> Tensor:
    model = our_model(inputs)
    with torch.inference_mode():
        return joined(model(inputs.images, outputs=inputs.outputs, memory_budget=inputs.budget).tensors())


def official_arithmetic(inputs: ModelInputs) -> Tensor:
    model = official_model(inputs)
    # Gradients are enabled so that the model runs without chunks and linear layers use torch's matmul. No parameter requires a gradient.
    with as_official(inputs.images.device.type, inputs.dtype), torch.enable_grad():
        return joined(model(inputs.images, outputs=inputs.outputs).tensors())


def joined(outputs: dict[str, Tensor]) -> Tensor:
    """All outputs in one vector, each scaled to norm 1."""
    found = [outputs[name].float() for name in ("pose_enc", "depth", "world_points") if name in outputs]
    return torch.cat([value.flatten() / value.norm() for value in found])


# --- one masked global block ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockInputs:
    """Tokens (1, N, 1024) in fp32, and the dtype of the matmuls."""

    x: Tensor
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> BlockInputs:
        return BlockInputs(self.x.detach().to(dtype), dtype)


def make_block_inputs(frames: int, dtype: torch.dtype, device: str) -> BlockInputs:
    tokens = frames * (SPECIAL + GRID[0] * GRID[1])
    return BlockInputs(torch.randn(1, tokens, 1024, generator=torch.Generator().manual_seed(0)).to(device), dtype)


@functools.lru_cache(maxsize=3)
def random_block(compute_dtype: torch.dtype, dtype: torch.dtype, device: str) -> Block:
    torch.manual_seed(0)
    block = Block(1024, 16, 4, qk_norm=True, scale_init=0.3).to(device, dtype)
    for part in (block.attn.qkv, block.attn.proj, block.mlp):
        part.to(compute_dtype)
    return block.requires_grad_(False)


def _run_block(block: Block, inputs: BlockInputs) -> Tensor:
    x = inputs.x
    acc = accumulation_dtype(x.dtype)
    per_frame = SPECIAL + GRID[0] * GRID[1]
    layout = TokenLayout(x.shape[1] // per_frame, per_frame, SPECIAL)
    tables = rope_tables(GRID, 64, device=x.device, dtype=acc)
    generator = torch.Generator().manual_seed(1)
    bias = torch.rand(1, layout.tokens, generator=generator).to(x.device, acc) - 0.5
    gate = layout.only_special(torch.full((1, layout.tokens), 64.0, device=x.device, dtype=acc))
    return block(x, Rope(*tables, GRID, SPECIAL), Modulation(gate, bias, layout))


def our_block(inputs: BlockInputs) -> Tensor:
    return _run_block(random_block(inputs.dtype, inputs.x.dtype, inputs.x.device.type), inputs)


def official_block(inputs: BlockInputs) -> Tensor:
    with as_official(inputs.x.device.type, inputs.dtype):
        return _run_block(random_block(torch.float32, torch.float32, inputs.x.device.type), inputs)
