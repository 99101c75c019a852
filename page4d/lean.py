"""The trunk without gradients: the arithmetic of its blocks, in place and piece by piece, so that only what must be whole is whole.

For all frames at once there are the residual stream, q, k, v and the output of one layer's attention, and the layers that the heads read.
Everything else (projections, MLPs, frame blocks, the encoder) is alive for a few frames only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from page4d_kernels.reference import accumulation_dtype

from .layers import Block, Modulation, Rope
from .memory import Plan, Workload, by_pieces, halved, offloaded, out_of_memory

log = logging.getLogger(__name__)


class Lean:
    """Runs an aggregator's parts by a plan. Tokens x are (B, S, P, C), contiguous, and change in place.

    A piece that runs out of memory is tried again with half as many frames; attention, with the kept layers moved to the host.
    """

    def __init__(self, plan: Plan, work: Workload, device: torch.device, dtype: torch.dtype):
        self.plan, self.work, self.device, self.dtype = plan, work, device, dtype
        self.kept: list[Tensor] = []
        self.copies: torch.cuda.Stream | None = None  # from the device to the host, beside the products

    def embed(self, encoder: nn.Module, normalise: Callable[[Tensor], Tensor], images: Tensor, special: Tensor) -> Tensor:
        """Special tokens (B, S, n, C) and the encoder's patches of images (B, S, 3, H, W), which may lie on another device."""
        batch, frames, first = special.shape[:3]
        x = special.new_empty(batch, frames, self.work.per_frame, special.shape[-1])
        x[:, :, :first] = special

        def work(piece: slice) -> None:
            pictures = images[:, piece].flatten(0, 1).to(self.device, non_blocking=True)
            x[:, piece, first:] = encoder(normalise(pictures)).unflatten(0, (batch, -1))

        self._by_pieces(frames, work)
        return x

    def frame(self, block: Block, x: Tensor, rope: Rope) -> Tensor:
        def work(piece: slice) -> None:
            x[:, piece] = block(x[:, piece].flatten(0, 1), rope).unflatten(0, (len(x), -1))

        self._by_pieces(x.shape[1], work)
        return x

    def mask(self, head: nn.Module, x: Tensor, grid: tuple[int, int], special: int) -> Tensor:
        """Key bias (B, S*P): the mask head looks at each frame alone."""
        bias = x.new_empty(x.shape[:3], dtype=accumulation_dtype(x.dtype))

        def work(piece: slice) -> None:
            bias[:, piece] = head(x[:, piece], grid, special).unflatten(1, (-1, x.shape[2]))

        self._by_pieces(x.shape[1], work)
        return bias.flatten(1)

    def across(self, block: Block, x: Tensor, rope: Rope, modulation: Modulation | None) -> Tensor:
        """A global block: attention over all frames, the rest by pieces of frames."""
        attention, frames, per_frame = block.attn, x.shape[1], x.shape[2]

        def attend() -> Tensor:
            q, k, v = self._project(block, x, rope)
            return attention.attend(q, k, v, modulation)

        out = self._with_room(attend)

        def work(piece: slice) -> None:
            rows = slice(piece.start * per_frame, piece.stop * per_frame)
            y = block.finish(x[:, piece].flatten(1, 2), attention.merge(out[:, :, rows]))
            x[:, piece] = y.unflatten(1, (-1, per_frame))

        self._by_pieces(frames, work)
        return x

    def _project(self, block: Block, x: Tensor, rope: Rope) -> list[Tensor]:
        """q, k, v (B, H, S*P, D) of the normalised tokens."""
        batch, frames, per_frame, dim = x.shape
        attention = block.attn
        shape = (batch, attention.num_heads, frames * per_frame, dim // attention.num_heads)
        whole = [x.new_empty(shape, dtype=self.dtype) for _ in range(3)]

        def work(piece: slice) -> None:
            parts = attention.project(block.norm1(x[:, piece].flatten(1, 2)), rope)
            for full, part in zip(whole, parts, strict=True):
                full[:, :, piece.start * per_frame : piece.stop * per_frame] = part

        self._by_pieces(frames, work)
        return whole

    def keep_frame(self, x: Tensor) -> None:
        """Remember x as the frame half of a layer that the heads read."""

        def room() -> Tensor:
            where = {"device": "cpu", "pin_memory": self.device.type == "cuda"} if self.plan.offload else {"device": self.device}
            return torch.empty(2, *x.shape, dtype=self.dtype, **where)

        self.kept.append(self._with_room(room))
        self._store(self.kept[-1][0], x)

    def keep(self, x: Tensor) -> None:
        """Remember x as the global half."""
        self._store(self.kept[-1][1], x)

    def layers(self) -> list[Tensor]:
        """The kept layers (B, S, P, 2, C)."""
        if self.copies is not None:
            self.copies.synchronize()  # the host itself may read them next: a part that is not contiguous is gathered there
        return [layer.movedim(0, -2) for layer in self.kept]

    def _store(self, half: Tensor, x: Tensor) -> None:
        if half.device == x.device or x.device.type != "cuda":
            half.copy_(x)
            return
        if self.copies is None:
            self.copies = torch.cuda.Stream(self.device)
        staged = x.to(self.dtype, copy=True)  # x changes before the copy is through
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            half.copy_(staged, non_blocking=True)
        staged.record_stream(self.copies)

    def _by_pieces(self, count: int, work: Callable[[slice], None]) -> None:
        """See `by_pieces`; once there is too little memory, the rest of the trunk is done in smaller pieces as well."""

        def smaller(frames: int) -> int:
            self.plan = halved(self.plan, self.work)
            log.warning("out of memory in spite of the plan: going on with %s", self.plan)
            return self.plan.trunk_frames

        by_pieces(count, self.plan.trunk_frames, work, smaller)

    def _with_room(self, work: Callable[[], Tensor]) -> Tensor:
        """`work`, once more with the kept layers moved to the host if it runs out of memory."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if self.device.type == "cpu" or self.plan.offload or not out_of_memory(error):
                raise
            self.plan = offloaded(self.plan, self.work)
            log.warning("out of memory in spite of the plan: going on with %s", self.plan)
            self.kept = [layer.cpu() for layer in self.kept]
        return work()


class Plain:
    """Runs an aggregator's parts with gradients, and for compilers: whole tensors, nothing in place."""

    def __init__(self, run: Callable[..., Tensor]):
        self.run = run  # run(block, *inputs) -> its output; may recompute it for the backward
        self.kept: list[Tensor] = []
        self.half: Tensor

    def embed(self, encoder: nn.Module, normalise: Callable[[Tensor], Tensor], images: Tensor, special: Tensor) -> Tensor:
        patches = encoder(normalise(images.to(special.device)).flatten(0, 1))
        return torch.cat([special, patches.unflatten(0, special.shape[:2]).to(special.dtype)], 2)

    def frame(self, block: Block, x: Tensor, rope: Rope) -> Tensor:
        return self.run(block, x.flatten(0, 1), rope).view_as(x)

    def mask(self, head: nn.Module, x: Tensor, grid: tuple[int, int], special: int) -> Tensor:
        return head(x, grid, special)

    def across(self, block: Block, x: Tensor, rope: Rope, modulation: Modulation | None) -> Tensor:
        return self.run(block, x.flatten(1, 2), rope, modulation).view_as(x)

    def keep_frame(self, x: Tensor) -> None:
        self.half = x

    def keep(self, x: Tensor) -> None:
        self.kept.append(torch.stack([self.half, x], -2))

    def layers(self) -> list[Tensor]:
        return self.kept
