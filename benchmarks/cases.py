"""What is measured: the cases, and per op the variants that compute them. Each case and each variant is one line of data.

A variant takes a case's inputs and returns a differentiable result. Before anything is timed, every variant must agree with float64 on
a smaller version of the case: one head for attention, one frame for the other ops. A variant that does not agree is not timed.
A new bandwidth-bound op needs only an entry in `bandwidth_ops.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from page4d.config import preset
from page4d_kernels import TokenLayout, mask_attention
from page4d_kernels.backends.mask_attention import BACKENDS as ATTENTION
from page4d_kernels.testing import AttentionInputs, attention_inputs

from . import formulas
from . import model as whole
from .bandwidth_ops import BANDWIDTH_OPS
from .sizes import PER_FRAME, SIZE, SPECIAL

FRAMES = (1, 2, 4, 8, 10, 20, 50, 100, 200, 500, 1000)  # of the whole model
DENSE_BYTES = 8 << 30  # the variant with a dense N x N bias is skipped above this size
BF16_ERROR = {"forward": 2e-2, "backward": 6e-2}  # relative to the norm; the official arithmetic also rounds the gate


@dataclass(frozen=True)
class Case:
    op: str
    direction: str
    frames: int
    dtype: torch.dtype
    heads: int = 16
    head_dim: int = 64

    @property
    def name(self) -> str:
        return f"{self.op}-{self.direction}-{self.frames}x{PER_FRAME}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def tokens(self) -> int:
        return self.frames * PER_FRAME

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    def ceilings(self, limits: dict[str, float]) -> dict[str, float]:
        """The peak rates for `work`. For attention: the matrix unit, or one exp2 per logit if that is slower."""
        dtype = str(self.dtype).removeprefix("torch.")
        matrix = limits.get(f"products_flops_{dtype}") or limits.get(f"matrix_flops_{dtype}", limits["matrix_flops_bfloat16"])
        if self.op in whole.OUTPUTS or self.op == "block":
            return {"flops": matrix}
        if self.op != "mask_attention":
            return {"flops": matrix, "bytes": limits["copy_bytes"]}
        per_exp2 = formulas.attention_flops(1, 1, 1, 1, self.head_dim, self.direction)
        return {"flops": min(matrix, limits["exp2"] * per_exp2), "bytes": limits["copy_bytes"]}

    def work(self) -> dict[str, float]:
        """The work of one call by unit, "flops" or "bytes", for every unit that can be the bottleneck."""
        if self.op in whole.OUTPUTS:
            config = preset("page4d-mask")
            parts = formulas.trunk_flops(config, self.frames, SIZE) | formulas.heads_flops(config, self.frames, SIZE)
            return {"flops": sum(flops for part, flops in parts.items() if self.op == "model" or part != "dense heads")}
        if self.op == "block":
            return {"flops": formulas.block_flops(preset("page4d-mask"), self.tokens, self.direction)}
        if self.op == "mask_attention":
            return {"flops": formulas.attention_flops(1, self.heads, self.tokens, self.tokens, self.head_dim, self.direction)}
        return BANDWIDTH_OPS[self.op].work(self)


def cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    directions = ("forward", "backward")
    found = [Case("mask_attention", direction, frames, bf16) for frames in (10, 40, 100) for direction in directions]
    found += [Case("mask_attention", "forward", frames, dtype) for frames in (2, 4, 8) for dtype in (fp32, bf16)]
    found += [Case("mask_attention", "backward", frames, fp32) for frames in (1, 4)]
    found += [Case(op, "forward", frames, dtype) for op in BANDWIDTH_OPS for frames in (4, 40) for dtype in (fp32, bf16)]
    found += [Case(op, "backward", 40, bf16) for op in BANDWIDTH_OPS]
    found += [Case("block", direction, frames, dtype) for direction in directions for frames in (4, 40) for dtype in (fp32, bf16)]
    found += [Case(op, "forward", frames, dtype) for op in ("trunk", "model") for frames in FRAMES for dtype in (fp32, bf16)]
    return found


QUICK = [Case("mask_attention", "forward", 1, torch.float32), Case("qk_norm_rope", "forward", 1, torch.float32)]


@dataclass(frozen=True)
class Variant:
    """`call(inputs)` computes. `biased` is False where the variant ignores the mask: it shows what plain attention costs."""

    name: str
    call: Callable[[Any], Any]
    biased: bool = True


# --- attention ---------------------------------------------------------------------------------------------------------------


def page4d_attention(inputs: AttentionInputs, backend: str, with_layout: bool = True) -> Any:
    vectors = inputs.query_gate, inputs.key_bias
    return mask_attention(inputs.q, inputs.k, inputs.v, *vectors, layout=inputs.layout if with_layout else None, backend=backend)


def page4d_attention_without_mask(inputs: AttentionInputs, backend: str) -> Any:
    return mask_attention(inputs.q, inputs.k, inputs.v, backend=backend)


def _torch_without_mask(inputs: AttentionInputs, kernel: SDPBackend | None = None) -> Tensor:
    with sdpa_kernel(kernel) if kernel is not None else contextlib.nullcontext():
        return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)


def _dense_bias(inputs: AttentionInputs) -> Tensor:
    assert inputs.query_gate is not None and inputs.key_bias is not None
    bias = (inputs.query_gate.unsqueeze(2) * inputs.key_bias.unsqueeze(1)).unsqueeze(1).to(inputs.q.dtype)
    return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, attn_mask=bias)


def attention_variants(case: Case, device: str) -> list[Variant]:
    found = [Variant("torch sdpa without mask", _torch_without_mask, biased=False)]
    for backend in ATTENTION:
        if backend.unavailable() or backend.name == "reference" or (backend.name == "flex" and case.direction == "backward"):
            continue
        found.append(Variant(backend.name, functools.partial(page4d_attention, backend=backend.name)))
    if device == "cuda":
        for name in ("triton", "cuda"):
            if not ATTENTION.get(name).unavailable():
                found.append(Variant(f"{name}, no layout", functools.partial(page4d_attention, backend=name, with_layout=False)))
                found.append(Variant(f"{name} without mask", functools.partial(page4d_attention_without_mask, backend=name), biased=False))
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            name = kernel.name.removesuffix("_ATTENTION").lower()
            found.append(Variant(f"torch sdpa ({name}) without mask", functools.partial(_torch_without_mask, kernel=kernel), biased=False))
    if case.tokens**2 * case.dtype.itemsize <= DENSE_BYTES:
        found.append(Variant("torch sdpa, dense bias", _dense_bias))
    return found


def make_attention_inputs(case: Case, device: str, heads: int) -> AttentionInputs:
    layout = TokenLayout(case.frames, PER_FRAME, SPECIAL)
    return attention_inputs(layout, heads=heads, head_dim=case.head_dim, dtype=case.dtype, device=device, packed=True)


def variants(case: Case, device: str) -> list[Variant]:
    if case.op in whole.OUTPUTS:
        return [Variant("page4d", whole.ours), Variant("official arithmetic", whole.official_arithmetic)]
    if case.op == "block":
        return [Variant("page4d", whole.our_block), Variant("official arithmetic", whole.official_block)]
    if case.op == "mask_attention":
        return attention_variants(case, device)
    op = BANDWIDTH_OPS[case.op]
    return [Variant(backend.name, functools.partial(op.call, backend=backend.name)) for backend in op.registry if not backend.unavailable()]


def make_inputs(case: Case, device: str, small: bool = False) -> Any:
    """The case's inputs. `small`: with only one head or one frame, for the gate."""
    if case.op in whole.OUTPUTS:
        return whole.make_inputs(case.op, case.frames, case.dtype, device, small)
    if case.op == "block":
        return whole.make_block_inputs(1 if small else case.frames, case.dtype, device)
    if case.op == "mask_attention":
        return make_attention_inputs(case, device, 1 if small else case.heads)
    return BANDWIDTH_OPS[case.op].inputs(case, device, 1 if small else case.frames)


# --- running and comparing ----------------------------------------------------------------------------------------------------


def leaves(case: Case, inputs: Any) -> list[Tensor]:
    """The tensors that get gradients."""
    if case.op == "mask_attention":
        return [x for x in inputs.tensors() if x is not None]
    if case.op == "block":
        return [inputs.x]  # the weights are frozen
    return inputs[BANDWIDTH_OPS[case.op].leaves]


def prepare(case: Case, variant: Variant, inputs: Any) -> Callable[[], Any]:
    """The function that is timed: the forward without autograd, or only the backward."""
    if case.direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return variant.call(inputs)

        return forward
    roots = [x.requires_grad_() for x in leaves(case, inputs)]
    out = variant.call(inputs)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return lambda: torch.autograd.grad(out, roots, d_out, retain_graph=True, allow_unused=True)


def upcast(case: Case, inputs: Any, dtype: torch.dtype) -> Any:
    return inputs.to(dtype) if not isinstance(inputs, list) else [x.detach().to(dtype) for x in inputs]


def oracle(case: Case, variant: Variant, inputs: Any) -> Any:
    """The result that the gate compares with: chunked or plain reference in float64, or fp32 for long backwards (float64 takes minutes)."""
    dtype = torch.float64 if case.direction == "forward" or case.tokens < 5000 else torch.float32
    exact = upcast(case, inputs, dtype)
    call: Callable[[Any], Any]
    if case.op in whole.OUTPUTS:
        call = whole.ours
    elif case.op == "block":
        call = whole.our_block
    elif case.op != "mask_attention":
        call = functools.partial(BANDWIDTH_OPS[case.op].call, backend=BANDWIDTH_OPS[case.op].reference)
    elif variant.biased:
        call = functools.partial(page4d_attention, backend="chunked")
    else:
        call = functools.partial(page4d_attention_without_mask, backend="chunked")
    return prepare(case, Variant("oracle", call, variant.biased), exact)()


@dataclass(frozen=True)
class Verdict:
    """Why a variant fails the gate (empty if it passes), its largest relative error, and for attention the error of the gated rows."""

    reason: str
    error: float | None = None
    gated_error: float | None = None


def gate(case: Case, variant: Variant, inputs: Any) -> Verdict:
    """Compare the variant with the oracle on `inputs`."""
    found, exact = prepare(case, variant, inputs)(), oracle(case, variant, inputs)
    pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
    tolerance = BF16_ERROR[case.direction] if case.dtype != torch.float32 else 1e-3
    if variant.name == "sdpa_augmented" and case.dtype != torch.float32:
        tolerance *= 10  # it rounds gate and bias to bf16, which changes a logit by up to 0.12
    names = {"forward": "output", "backward": "gradient"}
    errors = []
    for index, (x, y) in enumerate(pairs):
        name = f"{names[case.direction]} {index}"
        if x is None or y is None:
            if x is not y:
                return Verdict(f"{name} is missing")
            continue
        if case.op == "mask_attention" and isinstance(found, tuple) and index == 3:  # with a layout the gate is constant elsewhere
            x, y = inputs.layout.only_special(x), inputs.layout.only_special(y)
        errors.append(_distance(x, y))
        if not errors[-1] <= tolerance:
            return Verdict(f"{name} is off by {errors[-1]:.1e} (allowed {tolerance:.0e})", errors[-1])
    gated = None
    if case.op == "mask_attention" and case.direction == "forward" and variant.biased:
        gated = _distance(*(x.unflatten(2, (case.frames, PER_FRAME))[:, :, :, :SPECIAL] for x in (found, exact)))
    return Verdict("", max(errors), gated)


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())
