"""Two ways to run the trunk: eagerly on whole tensors, or streamed in chunks of frames with in-place updates.

Both do the same arithmetic. The streamed runner holds only five things for all frames at once: the residual stream, q, k, v and the
output of one layer's attention, and the saved layers that the heads read. Everything else exists for one chunk of frames at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeVar

import torch
from einops import pack, rearrange
from torch import Tensor, nn

from page4d_kernels.reference import accumulation_dtype

from ..layers import Block, Modulation, Rope, Sparsity
from ..layers.attention import deviation
from .memory import MemoryPlan, Workload, for_each_chunk, is_out_of_memory, with_bytes, with_half_chunks, with_offload

log = logging.getLogger(__name__)
T = TypeVar("T")


Heads: TypeAlias = Callable[[slice], Tensor]  # rows -> the heads' outputs (B, H, rows, D)


class TrunkRunner(Protocol):
    """The parts of a forward pass, in the order in which the aggregator calls them. Tokens are x (B, S, P, C) of the frames given here."""

    def span(self, frames: int) -> tuple[int, int]:
        """Of the sequence that these frames belong to: which one is the first of them, and how many there are."""
        ...

    def embed(self, encoder: nn.Module, normalise: Callable[[Tensor], Tensor], images: Tensor, special: Tensor) -> Tensor:
        """Tokens x: the special tokens (B, S, n, C), then the encoder's patch tokens of images (B, S, 3, H, W)."""
        ...

    def frame_block(self, block: Block, x: Tensor, rope: Rope) -> Tensor:
        """A block whose attention stays within each frame."""
        ...

    def mask_head(self, head: nn.Module, x: Tensor, grid: tuple[int, int], special_tokens: int) -> Tensor:
        """Key bias (B, S*P)."""
        ...

    def gathered(self, x: Tensor) -> Tensor:
        """x (B, S, P) of all frames of the sequence."""
        ...

    def save_frame_half(self, x: Tensor) -> None:
        """Save x as the frame half of a layer that the heads read. `save_global_half` follows before the next layer."""
        ...

    def global_block(self, block: Block, x: Tensor, rope: Rope, modulation: Modulation | None, sparsity: Sparsity | None) -> Tensor:
        """A block whose attention spans all frames. `sparsity`: what its patches do not see."""
        ...

    def save_global_half(self, x: Tensor) -> None:
        """Save x as the global half of the layer whose frame half was saved last."""
        ...

    def saved_layers(self) -> list[Tensor]:
        """The saved layers (B, S, P, 2, C): frame half, global half."""
        ...

    def deviations(self) -> list[Tensor]:
        """The relative deviation of each sparse global block so far that was checked, a number each."""
        ...


class _Alone:
    """The sequence has no other frames than those that are given."""

    measured: list[Tensor]  # `deviation_parts` of each sparse global block

    def span(self, frames: int) -> tuple[int, int]:
        return 0, frames

    def gathered(self, x: Tensor) -> Tensor:
        return x

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all that share the sequence."""
        return x

    def deviations(self) -> list[Tensor]:
        return list(deviation(self.summed(torch.stack(self.measured)))) if self.measured else []


class EagerRunner(_Alone):
    """Whole tensors, nothing in place: for gradients and for compilers.

    `call(block, *inputs)` returns the block's output. It may recompute the block in the backward pass (activation checkpointing).
    """

    def __init__(self, call: Callable[..., Tensor]):
        self.call = call
        self.saved: list[Tensor] = []
        self.measured = []  # with gradients nothing is checked
        self.frame_half: Tensor

    def embed(self, encoder: nn.Module, normalise: Callable[[Tensor], Tensor], images: Tensor, special: Tensor) -> Tensor:
        frames = rearrange(images.to(special.device), "b s c h w -> (b s) c h w")
        patches = rearrange(encoder(normalise(frames)), "(b s) p c -> b s p c", b=len(special))
        return pack([special, patches.to(special.dtype)], "b s * c")[0]

    def frame_block(self, block: Block, x: Tensor, rope: Rope) -> Tensor:
        return self.call(block, rearrange(x, "b s p c -> (b s) p c"), rope).view_as(x)

    def mask_head(self, head: nn.Module, x: Tensor, grid: tuple[int, int], special_tokens: int) -> Tensor:
        return head(x, grid, special_tokens)

    def save_frame_half(self, x: Tensor) -> None:
        self.frame_half = x

    def global_block(self, block: Block, x: Tensor, rope: Rope, modulation: Modulation | None, sparsity: Sparsity | None) -> Tensor:
        return self.call(block, rearrange(x, "b s p c -> b (s p) c"), rope, modulation, sparsity).view_as(x)

    def save_global_half(self, x: Tensor) -> None:
        self.saved.append(torch.stack([self.frame_half, x], -2))

    def saved_layers(self) -> list[Tensor]:
        return self.saved


class StreamedRunner(_Alone):
    """Chunks of frames by a memory plan, without gradients. Tokens x are contiguous and change in place.

    A chunk that runs out of memory is retried with half as many frames. Global attention that runs out of memory is retried once,
    after the saved layers have moved to the host.
    """

    def __init__(self, plan: MemoryPlan, workload: Workload, device: torch.device, dtype: torch.dtype):
        self.plan, self.workload, self.device, self.dtype = plan, workload, device, dtype
        self.saved: list[Tensor] = []  # (2, B, S, P, C) each
        self.measured = []
        self.offload_stream: torch.cuda.Stream | None = None  # copies to the host run beside the matmuls

    def embed(self, encoder: nn.Module, normalise: Callable[[Tensor], Tensor], images: Tensor, special: Tensor) -> Tensor:
        batch, frames, special_tokens = special.shape[:3]
        x = special.new_empty(batch, frames, self.workload.per_frame, special.shape[-1])
        x[:, :, :special_tokens] = special

        def step(chunk: slice) -> None:
            pictures = rearrange(images[:, chunk], "b s c h w -> (b s) c h w").to(self.device, non_blocking=True)
            x[:, chunk, special_tokens:] = rearrange(encoder(normalise(pictures)), "(b s) p c -> b s p c", b=batch)

        self._for_each_chunk(frames, step)
        return x

    def frame_block(self, block: Block, x: Tensor, rope: Rope) -> Tensor:
        def step(chunk: slice) -> None:
            y = block(rearrange(x[:, chunk], "b s p c -> (b s) p c"), rope)
            x[:, chunk] = rearrange(y, "(b s) p c -> b s p c", b=len(x))

        self._for_each_chunk(x.shape[1], step)
        return x

    def mask_head(self, head: nn.Module, x: Tensor, grid: tuple[int, int], special_tokens: int) -> Tensor:
        bias = x.new_empty(x.shape[:3], dtype=accumulation_dtype(x.dtype))

        def step(chunk: slice) -> None:
            bias[:, chunk] = rearrange(head(x[:, chunk], grid, special_tokens), "b (s p) -> b s p", p=x.shape[2])

        self._for_each_chunk(x.shape[1], step)
        return rearrange(bias, "b s p -> b (s p)")

    def global_block(self, block: Block, x: Tensor, rope: Rope, modulation: Modulation | None, sparsity: Sparsity | None) -> Tensor:
        attention, frames, per_frame = block.attn, x.shape[1], x.shape[2]
        heads = self._attend(block, x, rope, modulation, sparsity)

        def step(chunk: slice) -> None:
            rows = slice(chunk.start * per_frame, chunk.stop * per_frame)
            y = block.finish(rearrange(x[:, chunk], "b s p c -> b (s p) c"), attention.merge(heads(rows)))
            x[:, chunk] = rearrange(y, "b (s p) c -> b s p c", p=per_frame)

        self._for_each_chunk(frames, step)
        return x

    def _attend(self, block: Block, x: Tensor, rope: Rope, modulation: Modulation | None, sparsity: Sparsity | None) -> Heads:
        """The heads' outputs of all rows."""

        def attend() -> tuple[Tensor, Tensor | None]:
            q, k, v = self._project(block, x, rope)
            return block.attn.attend(q, k, v, modulation, sparsity)

        out, measured = self._retry_with_offload(attend)  # (B, H, S*P, D)
        self.measured += [] if measured is None else [measured]
        return lambda rows: out[:, :, rows]

    def _project(self, block: Block, x: Tensor, rope: Rope) -> list[Tensor]:
        """q, k, v (B, H, S*P, D) of the normalised tokens."""
        batch, frames, per_frame, dim = x.shape
        heads = block.attn.num_heads
        qkv = [x.new_empty((batch, heads, frames * per_frame, dim // heads), dtype=self.dtype) for _ in range(3)]

        def store(rows: slice, parts: Sequence[Tensor]) -> None:
            for whole, part in zip(qkv, parts, strict=True):
                whole[:, :, rows] = part

        self._project_chunks(block, x, rope, store)
        return qkv

    def _project_chunks(self, block: Block, x: Tensor, rope: Rope, store: Callable[[slice, Sequence[Tensor]], None]) -> None:
        """Give q, k, v (B, H, rows, D) of some rows at a time to `store`."""
        per_frame = x.shape[2]

        def step(chunk: slice) -> None:
            parts = block.attn.project(block.norm1(rearrange(x[:, chunk], "b s p c -> b (s p) c")), rope)
            store(slice(chunk.start * per_frame, chunk.stop * per_frame), parts)

        self._for_each_chunk(x.shape[1], step)

    def save_frame_half(self, x: Tensor) -> None:
        def allocate() -> Tensor:
            if self.plan.offload:
                return torch.empty(2, *x.shape, dtype=self.dtype, pin_memory=self.device.type == "cuda")
            return torch.empty(2, *x.shape, dtype=self.dtype, device=self.device)

        self.saved.append(self._retry_with_offload(allocate))
        self._store(self.saved[-1][0], x)

    def save_global_half(self, x: Tensor) -> None:
        self._store(self.saved[-1][1], x)

    def saved_layers(self) -> list[Tensor]:
        if self.offload_stream is not None:
            self.offload_stream.synchronize()  # the host may read the layers next, for example to make a slice contiguous
        return [rearrange(layer, "half b s p c -> b s p half c") for layer in self.saved]

    def _store(self, half: Tensor, x: Tensor) -> None:
        if half.device == x.device or x.device.type != "cuda":
            half.copy_(x)
            return
        if self.offload_stream is None:
            self.offload_stream = torch.cuda.Stream(self.device)
        staged = x.to(self.dtype, copy=True)  # x changes before the copy has finished
        self.offload_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.offload_stream):
            half.copy_(staged, non_blocking=True)
        staged.record_stream(self.offload_stream)

    def _for_each_chunk(self, frames: int, step: Callable[[slice], None]) -> None:
        """See `memory.for_each_chunk`. After an out-of-memory error the rest of the trunk also runs in smaller chunks."""

        def on_oom(_: int) -> int:
            self._go_on_with(with_half_chunks(self.plan))
            return self.plan.trunk_frames

        for_each_chunk(frames, self.plan.trunk_frames, step, on_oom)

    def _retry_with_offload(self, allocate: Callable[[], T]) -> T:
        """Call `allocate`. If it runs out of memory, move the saved layers to the host and call it again."""
        try:
            return allocate()
        except (RuntimeError, MemoryError) as error:
            if self.device.type == "cpu" or self.plan.offload or not is_out_of_memory(error):
                raise
            self._go_on_with(with_offload(self.plan))
            self.saved = [layer.cpu() for layer in self.saved]
        return allocate()

    def _go_on_with(self, plan: MemoryPlan) -> None:
        self.plan = with_bytes(plan, self.workload)
        log.warning("out of memory in spite of the plan: going on with %s", self.plan)
