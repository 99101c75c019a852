"""Two ways to run the trunk on several ranks, each with some frames of one sequence: like the eager runner, and like the streamed one.

All but global attention is the same as on one rank, on this rank's own frames.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from page4d_kernels import KeySelection, TokenLayout, frame_attention

from ..layers import Block, Modulation, Rope, Sparsity
from ..layers.attention import Attention, deviation_parts
from ..layers.cache import cache_tensors
from .across import Across
from .ring import Rows, by_head, by_token, ring_attention
from .runners import EagerRunner, Heads, StreamedRunner


class _Shared:
    """What both have in common."""

    across: Across

    def span(self, frames: int) -> tuple[int, int]:
        return self.across.start, self.across.total

    def gathered(self, x: Tensor) -> Tensor:
        return self.across.gather(x, "mask")

    def summed(self, x: Tensor) -> Tensor:
        return self.across.total_of(x, "deviation")


class ParallelEagerRunner(_Shared, EagerRunner):
    """Whole tensors, for gradients. See `EagerRunner`."""

    def __init__(self, call, across: Across):
        super().__init__(call)
        self.across = across

    def global_block(self, block: Block, x: Tensor, rope: Rope, modulation: Modulation | None, sparsity: Sparsity | None) -> Tensor:
        return self.call(block, rearrange(x, "b s p c -> b (s p) c"), rope, modulation, sparsity, self._attend).view_as(x)

    def _attend(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, modulation: Modulation | None, sparsity: Sparsity | None
    ) -> Tensor:
        across = self.across
        per_frame = q.shape[2] // across.frames[across.ranks.rank]
        q, k, v = (by_head(across.to_heads(across.split_heads(x))) for x in (q, k, v))
        out, _ = attend_row(across, attention, q, k, v, modulation, sparsity, per_frame)
        return rearrange(across.to_frames(by_token(out)), "u n b h d -> b (u h) n d")


class ParallelRunner(_Shared, StreamedRunner):
    """Chunks of frames by a memory plan of this rank, without gradients. See `StreamedRunner`.

    What does not fit inside an exchange is not tried again, as the other ranks would wait.
    """

    def __init__(self, *args, across: Across):
        super().__init__(*args)
        self.across = across

    def _attend(self, block: Block, x: Tensor, rope: Rope, modulation: Modulation | None, sparsity: Sparsity | None) -> Heads:
        across, attention, per_frame = self.across, block.attn, x.shape[2]
        parts = self._retry_with_offload(lambda: self._project_parts(block, x, rope))
        q, k, v = (by_head(across.start_to_heads(parts.pop(0)).wait()) for _ in range(3))  # one part at a time is freed
        out, measured = attend_row(across, attention, q, k, v, modulation, sparsity, per_frame)
        del q, k, v
        self.measured += [] if measured is None else [measured]
        sent = by_token(out)
        del out
        back = across.start_to_frames(sent).wait().unflatten(0, (across.mesh.heads, -1))
        return lambda rows: rearrange(back[:, rows], "u n b h d -> b (u h) n d")

    def _project_parts(self, block: Block, x: Tensor, rope: Rope) -> list[Tensor]:
        """q, k, v (u, S*P, B, h, D) of the normalised tokens: what goes to each rank lies together."""
        batch, frames, per_frame, dim = x.shape
        ways, heads = self.across.mesh.heads, block.attn.num_heads
        shape = (ways, frames * per_frame, batch, heads // ways, dim // heads)
        parts = [x.new_empty(shape, dtype=self.dtype) for _ in range(3)]

        def store(rows: slice, qkv: Sequence[Tensor]) -> None:
            for whole, part in zip(parts, qkv, strict=True):
                whole[:, rows] = rearrange(part, "b (u h) n d -> u n b h d", u=ways)

        self._project_chunks(block, x, rope, store)
        return parts


def attend_row(
    across: Across,
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modulation: Modulation | None,
    sparsity: Sparsity | None,
    per_frame: int,
) -> tuple[Tensor, Tensor | None]:
    """`Attention.attend` of the frames of this row of the mesh over those of all rows.

    Args:
        q, k, v: (B, h, N, D), this rank's heads.
        modulation, sparsity: of all frames.
        per_frame: tokens of a frame.
    """
    if across.mesh.rings == 1:
        return attention.attend(q, k, v, modulation, sparsity)
    gate = bias = None
    mine = across.rows_of_frames()[across.ranks.rank // across.mesh.heads]
    if modulation is not None:
        gate, bias = (x.to(attention.bias_dtype(q)) for x in (modulation.query_gate, modulation.key_bias))
        gate = gate[:, mine.start * per_frame : mine.stop * per_frame]
    layout = sparsity.layout if sparsity is not None else modulation.layout if modulation is not None else None
    if layout is None:
        return ring_attention(across, q, k, v, None, None, [Rows(None)], per_frame, attention.backend)[0], None
    layout = TokenLayout(mine.stop - mine.start, per_frame, layout.special_tokens)
    special, patches = rows_of(layout, q.device)
    if sparsity is None:
        kinds = [Rows(special, biased=True), Rows(patches)]
        first, second = ring_attention(across, q, k, v, gate, bias, kinds, per_frame, attention.backend)
        return _placed(q, (special, patches), (first, second)), None
    start, stop = mine.start * per_frame, mine.stop * per_frame
    checked = _inside(sparsity, start, stop)
    dense = Rows(torch.cat([special, checked]), biased=modulation is not None)
    if sparsity.keys is None:
        others = frame_attention(q, k, v, layout, backend=attention.backend)
        assert isinstance(others, Tensor)
        others = others.index_select(2, patches)
        (found,) = ring_attention(across, q, k, v, gate, bias, [dense], per_frame, attention.backend)
    else:
        blocks = tuple((frames.start * per_frame, frames.stop * per_frame) for frames in across.rows_of_frames())
        kept, log_counts = _divided(sparsity.keys, blocks)
        thin = Rows(patches, kept=kept, log_counts=log_counts)
        found, others = ring_attention(across, q, k, v, gate, bias, [dense, thin], per_frame, attention.backend)
    out = _placed(q, (special, patches), (found[:, :, : len(special)], others))
    if len(sparsity.checked) == 0:
        return out, None
    return out, deviation_parts(out.index_select(2, checked), found[:, :, len(special) :])


@cache_tensors
def rows_of(layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The places of the special tokens, and those of the patches."""
    special = torch.arange(layout.tokens) % layout.tokens_per_frame < layout.special_tokens
    return special.nonzero()[:, 0].to(device), (~special).nonzero()[:, 0].to(device)


@functools.lru_cache(maxsize=64)
def _inside(sparsity: Sparsity, start: int, stop: int) -> Tensor:
    """The checked rows among tokens `start` to `stop`, counted from there."""
    rows = sparsity.checked
    return rows[(rows >= start) & (rows < stop)] - start


@functools.lru_cache(maxsize=64)
def _divided(keys: KeySelection, blocks: tuple[tuple[int, int], ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The kept keys of each block, counted from its start, and their counts."""
    inside = [(keys.kept >= start) & (keys.kept < stop) for start, stop in blocks]
    kept = [keys.kept[which] - start for which, (start, _) in zip(inside, blocks, strict=True)]
    return kept, [keys.log_counts[which] for which in inside]


def _placed(q: Tensor, places: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """(B, h, N, D) of parts at their places, stored by token."""
    if q.requires_grad:
        order = torch.cat(list(places)).argsort()
        return torch.cat(list(parts), 2).index_select(2, order)
    out = q.new_empty(q.shape[2], q.shape[0], q.shape[1], q.shape[3])
    for place, part in zip(places, parts, strict=True):
        out[place] = part.permute(2, 0, 1, 3)
    return by_head(out)
