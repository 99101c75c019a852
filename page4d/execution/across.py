"""One sequence on several ranks: each has some of the frames. What global attention and the heads need of the others is exchanged here.

For global attention the ranks form a mesh of heads x rings. The `heads` ranks of a row exchange q, k and v so that each of them has
num_heads / heads heads of all frames of its row (all-to-all, "Ulysses"). Rows pass their keys on in a ring (ring.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from ..errors import InputError
from ..system import ranks_of_a_node
from .memory import Share
from .ranks import Pending, Ranks


@dataclass(frozen=True)
class Mesh:
    """How `heads` * `rings` ranks share global attention. Rank r is in row r // heads."""

    heads: int  # ranks among which the heads are divided
    rings: int  # rows, between which keys go round

    @classmethod
    def of(cls, ranks: int, num_heads: int, local: int | None = None) -> Mesh:
        """All-to-all among as many ranks as divide the heads, rings for the rest.

        `local`: ranks of a node. If there are several nodes, heads are divided within a node only, and rings go between nodes.
        """
        within = math.gcd(ranks, num_heads)
        if local is not None and local < ranks:
            within = math.gcd(within, local)
        return cls(within, ranks // within)

    def __str__(self) -> str:
        rows = f"all-to-all of heads among {self.heads} ranks"
        ring = f"a ring of {self.rings} ranks"
        return rows if self.rings == 1 else ring if self.heads == 1 else f"{rows}, rings of {self.rings} between them"


def shares(frames: int, ranks: int) -> list[int]:
    """How many frames each rank has, as equal as possible, the larger shares first."""
    return [frames // ranks + (rank < frames % ranks) for rank in range(ranks)]


def divided(group: dist.ProcessGroup, device: torch.device, frames: int, num_heads: int) -> Across:
    """A sequence of so many frames that is divided as `shares` says."""
    ranks = Ranks.of(group, device)
    return Across(ranks, tuple(shares(frames, ranks.size)), Mesh.of(ranks.size, num_heads, ranks_of_a_node()))


def agreed(ranks: Ranks, frames: int, num_heads: int, facts: dict[str, Any]) -> Across:
    """The sequence of which this rank has some frames.

    Args:
        facts: what must be the same on all ranks, by its name for users.

    Raises:
        InputError: on all ranks, if it is not.
    """
    facts = {"kind of device": ranks.device.type, **facts}
    found = ranks.agree({"frames": frames, "node": ranks_of_a_node(), **facts})
    for name in facts:
        for rank, other in enumerate(found):
            if other[name] != found[0][name]:
                shown = f"rank 0 has {found[0][name]!s:.60}, rank {rank} has {other[name]!s:.60}"
                raise InputError(f"all ranks of a group need the same {name}: {shown}")
    nodes = [other["node"] or ranks.size for other in found]
    return Across(ranks, tuple(other["frames"] for other in found), Mesh.of(ranks.size, num_heads, math.gcd(*nodes)))


def largest_share(frames: int, ranks: int, num_heads: int) -> tuple[int, Share]:
    """The frames of the first rank, which has the most, and its share, before there is a group. See `shares`."""
    counts, mesh = shares(frames, ranks), Mesh.of(ranks, num_heads, ranks_of_a_node())
    row = sum(counts[: mesh.heads])
    return counts[0], Share(frames, row, row, mesh.heads, mesh.rings)


@dataclass(frozen=True, eq=False)
class Across:
    """A sequence whose frames are divided among ranks, in their order."""

    ranks: Ranks
    frames: tuple[int, ...]  # of each rank
    mesh: Mesh

    @property
    def total(self) -> int:
        return sum(self.frames)

    @property
    def start(self) -> int:
        """The first frame of this rank."""
        return sum(self.frames[: self.ranks.rank])

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.frames[self.ranks.rank])

    @property
    def row(self) -> list[int]:
        """The ranks with which this one divides the heads."""
        first = self.ranks.rank // self.mesh.heads * self.mesh.heads
        return list(range(first, first + self.mesh.heads))

    @property
    def share(self) -> Share:
        rows = self.frames_of_rows()
        mine = rows[self.ranks.rank // self.mesh.heads]
        return Share(self.total, mine, max(rows), self.mesh.heads, self.mesh.rings)

    def frames_of_rows(self) -> list[int]:
        """How many frames each row of the mesh has."""
        heads = self.mesh.heads
        return [sum(self.frames[first : first + heads]) for first in range(0, len(self.frames), heads)]

    def rows_of_frames(self) -> list[slice]:
        """The frames of each row of the mesh."""
        ends = list(accumulate(self.frames_of_rows()))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    # --- all-to-all between frames and heads -----------------------------------------------------------------------------------------

    def to_heads(self, x: Tensor) -> Tensor:
        """Own frames and all heads (u, own tokens, B, h, D) -> the tokens of all frames of the row (tokens, B, h, D). Differentiable."""
        return _ToHeads.apply(x, self)

    def to_frames(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`."""
        return _ToFrames.apply(x, self)

    def _tokens(self, per_frame: int) -> list[int]:
        """How many tokens this rank exchanges with each other in `to_heads`: those of the row's ranks."""
        row = self.row
        return [count * per_frame if rank in row else 0 for rank, count in enumerate(self.frames)]

    def start_to_heads(self, x: Tensor) -> Pending:
        """x (u, own tokens, B, h, D) contiguous; wait for (tokens of the row, B, h, D)."""
        tokens = self._tokens(x.shape[1] // self.frames[self.ranks.rank])
        send = x.flatten(0, 1)
        receive = send.new_empty(sum(tokens), *send.shape[1:])
        mine = [x.shape[1] if rank in self.row else 0 for rank in range(self.ranks.size)]
        return self.ranks.start("attention", send, mine, receive, tokens)

    def start_to_frames(self, x: Tensor) -> Pending:
        """x (tokens of the row, B, h, D) contiguous; wait for (u * own tokens, B, h, D)."""
        frames = sum(self.frames[rank] for rank in self.row)
        tokens = self._tokens(len(x) // frames)
        own = tokens[self.ranks.rank]
        receive = x.new_empty(self.mesh.heads * own, *x.shape[1:])
        return self.ranks.start("attention", x, tokens, receive, [own if rank in self.row else 0 for rank in range(self.ranks.size)])

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (u, N, B, h, D), contiguous: the parts of the ranks of a row, one after the other."""
        return rearrange(x, "b (u h) n d -> u n b h d", u=self.mesh.heads).contiguous()

    # --- gathering -------------------------------------------------------------------------------------------------------------------

    def gather(self, x: Tensor, kind: str) -> Tensor:
        """(B, S of this rank, ...) -> (B, S of all ranks, ...) on all ranks. Differentiable: the gradients of all ranks are summed."""
        return _Gather.apply(x, self, kind)

    def total_of(self, x: Tensor, kind: str) -> Tensor:
        """The sum of x over all ranks, without gradients, in the same order on all of them."""
        with torch.no_grad():
            send = x.unsqueeze(0).repeat(self.ranks.size, *[1] * x.dim())
            ones = [1] * self.ranks.size
            return self.ranks.start(kind, send, ones, torch.empty_like(send), ones).wait().sum(0)

    def from_first(self, x: Tensor, kind: str) -> Tensor:
        """x of the rank with frame 0, on all ranks. Differentiable; all ranks give an x, so that all of them take part in the backward."""
        return _FromFirst.apply(x, self, kind)

    def start_gather(self, x: Tensor, kind: str) -> Pending:
        """x (S of this rank, ...) contiguous; wait for (S of all ranks, ...)."""
        size, own = self.ranks.size, self.frames[self.ranks.rank]
        send = x.unsqueeze(0).expand(size, *x.shape).flatten(0, 1)
        return self.ranks.start(kind, send.contiguous(), [own] * size, x.new_empty(self.total, *x.shape[1:]), self.frames)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, across):
        ctx.across, ctx.heads = across, x.shape[0]
        return across.start_to_heads(x.contiguous()).wait()

    @staticmethod
    def backward(ctx, d_out):
        d_x = ctx.across.start_to_frames(d_out.contiguous()).wait()
        return d_x.unflatten(0, (ctx.heads, -1)), None


class _ToFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, across):
        ctx.across = across
        return across.start_to_frames(x.contiguous()).wait().unflatten(0, (across.mesh.heads, -1))

    @staticmethod
    def backward(ctx, d_out):
        return ctx.across.start_to_heads(d_out.contiguous()).wait(), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, across, kind):
        ctx.across, ctx.kind = across, kind
        return across.start_gather(x.transpose(0, 1).contiguous(), kind).wait().transpose(0, 1)

    @staticmethod
    def backward(ctx, d_out):
        across, size = ctx.across, ctx.across.ranks.size
        send = d_out.transpose(0, 1).contiguous()
        own = across.frames[across.ranks.rank]
        receive = send.new_empty(size * own, *send.shape[1:])
        found = across.ranks.start(ctx.kind, send, across.frames, receive, [own] * size).wait()
        return found.unflatten(0, (size, own)).sum(0).transpose(0, 1), None, None


class _FromFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, across, kind):
        ctx.across, ctx.kind = across, kind
        ranks = across.ranks
        first = ranks.rank == 0
        send = x.unsqueeze(0).expand(ranks.size if first else 0, *x.shape).contiguous()
        expected = [1] + [0] * (ranks.size - 1)
        return ranks.start(kind, send, [int(first)] * ranks.size, x.new_empty(1, *x.shape), expected).wait()[0]

    @staticmethod
    def backward(ctx, d_out):
        ranks = ctx.across.ranks
        first = ranks.rank == 0
        receive = d_out.new_empty(ranks.size if first else 0, *d_out.shape)
        sizes = [1] + [0] * (ranks.size - 1)
        found = ranks.start(ctx.kind, d_out.unsqueeze(0).contiguous(), sizes, receive, [int(first)] * ranks.size).wait()
        return found.sum(0), None, None  # zeros on the other ranks, from which nothing was taken
