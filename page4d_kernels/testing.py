"""Error budgets and input factories, shared by tests and benchmarks.

A result may be at most twice as wrong as plain PyTorch in the same dtype: |out - oracle| <= 2 |plain - oracle| + a rounding term. The
oracle is float64, on inputs upcast from the tested dtype.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backends.registry import BackendError, registries
from .layout import TokenLayout
from .ops.mask_attention import describe, mask_attention
from .reference import accumulation_dtype
from .reference.mask_attention import mask_attention as reference

NAMES = ("q", "k", "v", "query_gate", "key_bias")


def devices_of(backend: str) -> tuple[str, ...]:
    """The device types that a backend of this name can serve, the default first."""
    if backend == "cpu" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return ("cpu",)
    only_cuda = backend in ("triton", "cuda", "flash", "xformers") or (
        backend.startswith("sdpa_") and backend not in ("sdpa_augmented", "sdpa_rows")
    )
    return ("cuda",) if only_cuda else ("cpu", "cuda")


def default_device(backend: str) -> str:
    """The device for a test that needs only one: the CPU if the backend serves it."""
    return devices_of(backend)[0]


@dataclass(frozen=True)
class AttentionInputs:
    q: Tensor
    k: Tensor
    v: Tensor
    query_gate: Tensor | None
    key_bias: Tensor | None
    layout: TokenLayout | None

    def tensors(self) -> list[Tensor | None]:
        return [self.q, self.k, self.v, self.query_gate, self.key_bias]

    def attend(self, backend: str, **options: Any) -> Any:
        """Call `mask_attention` with these inputs."""
        return mask_attention(self.q, self.k, self.v, self.query_gate, self.key_bias, layout=self.layout, backend=backend, **options)

    def reasons(self, backend: str) -> list[str]:
        """Why the backend cannot serve these inputs. If there are reasons, checks that the call raises them instead of falling back."""
        problem = describe(self.q, self.k, self.v, self.query_gate, self.key_bias, layout=self.layout)
        reasons = registries()["mask_attention"].reasons(backend, problem)
        if reasons:
            try:
                self.attend(backend)
            except BackendError as error:
                assert all(reason in str(error) for reason in reasons), error
            else:
                raise AssertionError(f"{backend} served a call that it says it cannot serve: {reasons}")
        return reasons

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """New leaves: q, k, v in `dtype`, the bias vectors in its accumulation dtype."""
        vectors = accumulation_dtype(dtype)
        q, k, v = (x.detach().to(dtype) for x in (self.q, self.k, self.v))
        query_gate, key_bias = (None if x is None else x.detach().to(vectors) for x in (self.query_gate, self.key_bias))
        return AttentionInputs(q, k, v, query_gate, key_bias, self.layout)

    def requires_grad_(self) -> AttentionInputs:
        for x in self.tensors():
            if x is not None:
                x.requires_grad_()
        return self


def attention_inputs(
    layout: TokenLayout,
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    strength: float = 64.0,
    spread: float = 1.0,
    packed: bool = False,
    seed: int = 0,
) -> AttentionInputs:
    """Random q, k, v ~ spread * N(0, 1), gate = strength at special tokens, bias ~ U(-1/2, 1/2) at patches.

    `packed`: q, k, v are views of one (B, N, 3, H, D) projection, as in the model.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = layout.tokens
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator, dtype=torch.float64) * spread
    qkv = qkv.to(device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
    q, k, v = qkv if packed else qkv.contiguous()
    special = (torch.arange(tokens) % layout.tokens_per_frame < layout.special_tokens).expand(batch, -1)
    bias = torch.rand(batch, tokens, generator=generator, dtype=torch.float64) - 0.5
    vectors = (special * strength, bias.masked_fill(special, 0))
    query_gate, key_bias = (x.to(device=device, dtype=accumulation_dtype(dtype)) for x in vectors)
    return AttentionInputs(q, k, v, query_gate, key_bias, layout)


def plain_attention(inputs: AttentionInputs, scale: float) -> Tensor:
    """Attention as a user would write it in the dtype of the inputs, which rounds logits and probabilities to it. Sets the error budget."""
    logits = inputs.q @ inputs.k.transpose(-1, -2) * scale
    if inputs.query_gate is not None and inputs.key_bias is not None:
        logits = logits + (inputs.query_gate[:, None, :, None] * inputs.key_bias[:, None, None, :]).to(logits.dtype)
    return logits.softmax(-1) @ inputs.v


def oracle_attention(inputs: AttentionInputs, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64. Differentiable in inputs that already are float64 leaves."""
    exact = inputs if inputs.q.dtype == torch.float64 else inputs.to(torch.float64)
    return reference(exact.q, exact.k, exact.v, exact.query_gate, exact.key_bias, scale)


def assert_within_budget(name: str, result: Tensor, oracle: Tensor, plain: Tensor, factor: float = 2.0, slack: float = 0.0) -> None:
    """The largest error may be `factor` times that of the plain version plus a few roundings of the largest value. NaN never passes.

    `slack` is an absolute tolerance for results that are small differences of large terms, see `gradient_slack`.
    """
    rounding = torch.finfo(result.dtype).eps * 4 * float(oracle.abs().max()) + slack
    budget = factor * float((plain.double() - oracle).abs().max()) + rounding
    error = float((result.double() - oracle).abs().max())
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3e} is over its budget {budget:.3e} (values up to {float(oracle.abs().max()):.3e})")


@torch.no_grad()
def gradient_slack(exact: AttentionInputs, out: Tensor, lse: Tensor, d_out: Tensor, scale: float) -> dict[str, float]:
    """A bound on the rounding error of each gradient: the backward formulas with every term replaced by its magnitude.

    dS = P (dP - rowsum(dO O)) suffers from cancellation, and the fp32 rounding of lse affects every value of P = exp(logit - lse). The
    gradients of gate and bias also sum the rounding of O, which has the dtype of `d_out`, over all keys.
    """
    q, k, v, r, c = (None if x is None else x.detach().abs() for x in exact.tensors())
    assert q is not None and k is not None and v is not None
    rounding_of_out = torch.finfo(d_out.dtype).eps / 2
    d_out = d_out.double().abs()
    logits = exact.q @ exact.k.transpose(-1, -2) * scale
    if exact.query_gate is not None and exact.key_bias is not None:
        logits = logits + exact.query_gate[:, None, :, None] * exact.key_bias[:, None, None, :]
    p = torch.exp(logits - lse.unsqueeze(-1))
    terms = p * (d_out @ v.transpose(-1, -2) + (d_out * out.abs()).sum(-1, keepdim=True))
    sizes = {"q": terms @ k * scale, "k": terms.transpose(-1, -2) @ q * scale, "v": p.transpose(-1, -2) @ d_out}
    rounding = torch.finfo(torch.float32).eps * (4 + float(lse.abs().max()))
    slack = {name: rounding * float(size.max()) for name, size in sizes.items()}
    if r is not None and c is not None:
        of_delta = p * (d_out * out.abs()).sum(-1, keepdim=True) * rounding_of_out
        over_heads = (rounding * terms + of_delta).sum(1)
        slack |= {"query_gate": float((over_heads @ c.unsqueeze(2)).max()), "key_bias": float((r.unsqueeze(1) @ over_heads).max())}
    return slack


def attention_gradients(out: Tensor, inputs: AttentionInputs, d_out: Tensor) -> dict[str, Tensor]:
    """Gradients by name, for the inputs that are not None."""
    present = {name: x for name, x in zip(NAMES, inputs.tensors(), strict=True) if x is not None}
    gradients = torch.autograd.grad(out, list(present.values()), d_out.to(out.dtype), materialize_grads=True)
    return dict(zip(present, gradients, strict=True))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still alive; kernels' own working space is not seen."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size
