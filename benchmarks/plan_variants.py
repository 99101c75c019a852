"""Attention plans that are measured beside the ones of the library: the mask as a budget, and block-sparse attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from page4d.execution.attention_plan import AttentionPlan, checked_rows, kept_patches
from page4d.layers import Sparsity
from page4d.layers.attention import deviation_parts
from page4d_kernels import KeySelection, TokenLayout, mask_attention
from page4d_kernels.reference.block_sparse import block_sparse_attention

HIDDEN = -1e4  # as a key bias: the weight is 0


@dataclass(frozen=True)
class BudgetPlan(AttentionPlan):
    """Cells, but those where the most moves keep all their keys, in the layers with the mask.

    Their number is fixed: as many keys are seen as `like`, a smaller cell, keeps. Of all frames but the first, the cells with the lowest
    mean key bias are chosen, on the device. Ties go to the first. `inverted`: the cells where the least moves, as a control.
    """

    like: tuple[int, int] = (2, 2)
    inverted: bool = False

    def sparsity(self, layer: int, layout: TokenLayout, grid: tuple[int, int], checked: int, device: torch.device) -> Sparsity | None:
        plain, cell = super().sparsity(layer, layout, grid, checked, device), self.layers[layer]
        if plain is None or plain.keys is None or not isinstance(cell, tuple):
            return plain
        members, chosen_by = _cells(plain.keys, layout, grid, cell)
        few, many = kept_patches(grid, cell), kept_patches(grid, self.like)
        extra = grid[0] * grid[1] / few - 1  # keys that a whole cell adds
        whole = round((many - few) * (layout.frames - 1) / extra)
        return _Budget(layout, plain.keys, plain.checked, members, chosen_by, whole, -1 if self.inverted else 1)


@dataclass(frozen=True, eq=False)
class _Budget(Sparsity):
    members: Tensor  # (cells, most) int64: the patches of each cell, of all frames but the first; -1 beyond the last
    chosen_by: Tensor  # (cells,) int64: where the cell's kept patch is among the kept keys
    whole: int  # cells that keep all
    sign: int

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor | None]:
        assert self.keys is not None and len(q) == 1
        if bias is None:
            return super().attend(q, k, v, gate, bias, backend)
        there = self.members >= 0
        moving = (bias[0][self.members] * there).sum(1) / there.sum(1)
        best = (self.sign * moving).argsort(stable=True)[: self.whole]
        weights = self.keys.log_counts.index_fill(0, self.chosen_by[best], HIDDEN)  # the cell's patches follow, each for itself
        all_members = self.members[best].flatten()
        kept = torch.cat([self.keys.kept, all_members.clamp(min=0)])
        weights = torch.cat([weights, torch.where(all_members >= 0, 0.0, HIDDEN).double()])
        return Sparsity(self.layout, KeySelection(self.layout, kept, weights), self.checked).attend(q, k, v, gate, bias, backend)


def _cells(keys: KeySelection, layout: TokenLayout, grid: tuple[int, int], cell: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """See `_Budget.members` and `chosen_by`."""
    rows, columns = (_which(side, least) for side, least in zip(grid, cell, strict=True))
    number = (rows[:, None] * (int(columns.max()) + 1) + columns).flatten()
    cells = int(number.max()) + 1
    members = [
        frame * layout.tokens_per_frame + layout.special_tokens + (number == index).nonzero()[:, 0]
        for frame in range(1, layout.frames)
        for index in range(cells)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)
    place = {int(token): index for index, token in enumerate(keys.kept)}
    chosen = [next(place[token] for token in patches.tolist() if token in place) for patches in members]
    return padded, torch.tensor(chosen)


def _which(side: int, least: int) -> Tensor:
    """The cell of each place along a side, as `select_keys` divides it."""
    count = max(1, side // least)
    return torch.bucketize(torch.arange(side), torch.arange(1, count) * side // count, right=True)


@dataclass(frozen=True)
class BlockPlan(AttentionPlan):
    """Block-sparse attention in every layer, by the reference. `computed` gets the fraction of the pairs that each call computes."""

    blocks: tuple[int, int] = (16, 8)
    share: float = 0.0
    floor: float = 0.25
    computed: list[float] = field(default_factory=list, compare=False)

    @property
    def exact(self) -> bool:
        return False

    def sparsity(self, layer: int, layout: TokenLayout, grid: tuple[int, int], checked: int, device: torch.device) -> Sparsity | None:
        return _Blocks(layout, None, checked_rows(layout, checked, device), self)


@dataclass(frozen=True, eq=False)
class _Blocks(Sparsity):
    plan: BlockPlan

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor | None]:
        scale, plan = 1 / math.sqrt(q.shape[-1]), self.plan
        out, computed = block_sparse_attention(
            q, k, v, self.layout, gate, bias, scale, blocks=plan.blocks, share=plan.share, floor=plan.floor
        )
        plan.computed.append(float(computed))
        dense = mask_attention(q.index_select(2, self.checked), k, v, backend=backend) if len(self.checked) else None
        return out, deviation_parts(out.index_select(2, self.checked), dense) if isinstance(dense, Tensor) else None
