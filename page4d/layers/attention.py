"""Multi-head self-attention through the kernel library, with optional QK-norm + RoPE and mask modulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from page4d_kernels import KeySelection, TokenLayout, frame_attention, mask_attention, qk_norm_rope, rope_tables, thin_attention
from page4d_kernels.reference import accumulation_dtype

from .cache import cache_tensors
from .linear import LayerNorm, Linear


@dataclass(frozen=True)
class Rope:
    """Rotary tables of a patch grid, for `qk_norm_rope`."""

    cos: Tensor  # (positions, D/4)
    sin: Tensor
    grid: tuple[int, int]
    special_tokens: int


@cache_tensors
def rope(grid: tuple[int, int], special_tokens: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype) -> Rope:
    """Cached per grid, device and dtype."""
    cos, sin = rope_tables(grid, head_dim, base, device, dtype)
    return Rope(cos, sin, grid, special_tokens)


@dataclass(frozen=True)
class Modulation:
    """The dynamics mask as attention takes it."""

    query_gate: Tensor  # (B, N)
    key_bias: Tensor  # (B, N)
    layout: TokenLayout


@dataclass(frozen=True, eq=False)
class Sparsity:
    """What the patches see in a layer that is not dense, see `page4d_kernels.thin_attention`."""

    layout: TokenLayout
    keys: KeySelection | None  # None: the tokens of the own frame
    checked: Tensor  # (R,) int64: patch rows that are computed densely as well, to measure what is lost

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, backend: str | None
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs (B, H, N, D), and `deviation_parts` of the checked rows, if there are any."""
        rows = self.checked if len(self.checked) else None
        if self.keys is None:
            found = frame_attention(q, k, v, self.layout, gate, bias, backend=backend, dense_rows=rows)
        else:
            found = thin_attention(q, k, v, self.keys, gate, bias, backend=backend, dense_rows=rows)
        if isinstance(found, Tensor):
            return found, None
        out, dense = found
        return out, deviation_parts(out.index_select(2, self.checked), dense)


def deviation_parts(sparse: Tensor, dense: Tensor) -> Tensor:
    """|sparse - dense|^2 and |dense|^2, (2,): parts of several heads and rows can be added. See `deviation`."""
    sparse, dense = sparse.float(), dense.float()
    return torch.stack([(sparse - dense).square().sum(), dense.square().sum()])


def deviation(parts: Tensor) -> Tensor:
    """|sparse - dense| / |dense| of parts (..., 2)."""
    return (parts[..., 0] / parts[..., 1]).sqrt()


Attend: TypeAlias = Callable[["Attention", Tensor, Tensor, Tensor, Modulation | None, Sparsity | None], Tensor]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D) + r c^T) v between a packed projection and an output projection."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, backend: str | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = LayerNorm(dim // num_heads) if qk_norm else None
        self.k_norm = LayerNorm(dim // num_heads) if qk_norm else None
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        modulation: Modulation | None = None,
        sparsity: Sparsity | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C). `attend` replaces the method, for tokens that are not all here."""
        q, k, v = self.project(x, rope)
        if attend is not None:
            return self.merge(attend(self, q, k, v, modulation, sparsity))
        return self.merge(self.attend(q, k, v, modulation, sparsity)[0])

    def project(self, x: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, D) of tokens (B, N, C). N may be all frames or some of them."""
        qkv = rearrange(self.qkv(x), "b n (qkv h d) -> b n qkv h d", qkv=3, h=self.num_heads)
        if self.q_norm is not None and self.k_norm is not None and rope is not None:
            return qk_norm_rope(
                qkv,
                self.q_norm.weight,
                self.q_norm.bias,
                self.k_norm.weight,
                self.k_norm.bias,
                rope.cos,
                rope.sin,
                grid=rope.grid,
                special_tokens=rope.special_tokens,
                eps=self.q_norm.eps,
            )
        q, k, v = rearrange(qkv, "b n qkv h d -> qkv b h n d")
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, modulation: Modulation | None = None, sparsity: Sparsity | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs (B, H, N, D), and `deviation_parts` if the sparsity has rows to check."""
        gate = bias = None
        if modulation is not None:
            gate, bias = (vector.to(self.bias_dtype(q)) for vector in (modulation.query_gate, modulation.key_bias))
        if sparsity is not None:
            return sparsity.attend(q, k, v, gate, bias, self.backend)
        out = mask_attention(q, k, v, gate, bias, layout=None if modulation is None else modulation.layout, backend=self.backend)
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out, None

    @staticmethod
    def bias_dtype(q: Tensor) -> torch.dtype:
        """Of the query gate and the key bias."""
        return accumulation_dtype(q.dtype)

    def merge(self, out: Tensor) -> Tensor:
        """The output projection of the heads' outputs: (B, H, N, D) -> (B, N, C)."""
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))
