"""What is measured: cases and, per op, the variants that compute them. Adding a case or a variant is adding a line of data.

A variant takes a case's inputs and returns a result that autograd can go back through. Before anything is timed, every variant has to
agree with float64 on the case's own shape with one head (attention) or one frame (the other ops); one that does not is not timed.
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
from page4d_kernels import TokenLayout, mask_attention, mask_head, qk_norm_rope, residual_norm, rope_tables
from page4d_kernels.backends.mask_attention import BACKENDS as ATTENTION
from page4d_kernels.backends.mask_head import BACKENDS as MASK_HEAD
from page4d_kernels.backends.qk_norm_rope import BACKENDS as QK_NORM_ROPE
from page4d_kernels.backends.registry import Registry
from page4d_kernels.backends.residual_norm import BACKENDS as RESIDUAL_NORM
from page4d_kernels.testing import AttentionInputs, attention_inputs

from . import formulas
from . import model as whole

GRID, SPECIAL = (24, 37), 5  # 336 x 518 pixels in patches of 14
PER_FRAME = SPECIAL + GRID[0] * GRID[1]
HIDDEN = 256  # of the mask head
FRAMES = (1, 2, 4, 8, 10, 20, 50, 100, 200, 500, 1000)  # of the whole model
DENSE_BYTES = 8 << 30  # a dense N x N bias larger than this is left out
BF16_ERROR = {"forward": 2e-2, "backward": 6e-2}  # relative to the norm; the official arithmetic rounds the gate as well


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

    def ceilings(self, limits: dict[str, float]) -> dict[str, float]:
        """The rates that bind `work`: for attention the matrix unit or the one exp2 per logit, whichever is slower."""
        dtype = str(self.dtype).removeprefix("torch.")
        matrix = limits.get(f"products_flops_{dtype}") or limits.get(f"matrix_flops_{dtype}", limits["matrix_flops_bfloat16"])
        if self.op in whole.OUTPUTS or self.op == "block":
            return {"flops": matrix}
        if self.op != "mask_attention":
            return {"flops": matrix, "bytes": limits["copy_bytes"]}
        per_exp2 = formulas.attention_flops(1, 1, 1, 1, self.head_dim, self.direction)
        return {"flops": min(matrix, limits["exp2"] * per_exp2), "bytes": limits["copy_bytes"]}

    def work(self) -> dict[str, float]:
        """Flops and bytes of one call, as far as they can bind it."""
        if self.op in whole.OUTPUTS:
            config = preset("page4d-mask")
            parts = formulas.trunk_flops(config, self.frames, whole.SIZE) | formulas.heads_flops(config, self.frames, whole.SIZE)
            return {"flops": sum(flops for part, flops in parts.items() if self.op == "model" or part != "dense heads")}
        if self.op == "block":
            return {"flops": formulas.block_flops(preset("page4d-mask"), self.tokens, self.direction)}
        if self.op == "mask_attention":
            return {"flops": formulas.attention_flops(1, self.heads, self.tokens, self.tokens, self.head_dim, self.direction)}
        work = {"bytes": OTHERS[self.op].bytes(self)}
        if self.op == "mask_head":
            patches = self.frames * GRID[0] * GRID[1]
            work["flops"] = formulas.mask_head_flops(patches, self.heads * self.head_dim, HIDDEN, self.direction)
        return work


def cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    found = [Case("mask_attention", way, frames, bf16) for frames in (10, 40, 100) for way in ("forward", "backward")]
    found += [Case("mask_attention", "forward", frames, dtype) for frames in (2, 4, 8) for dtype in (fp32, bf16)]
    found += [Case("mask_attention", "backward", frames, fp32) for frames in (1, 4)]
    found += [Case(op, "forward", frames, dtype) for op in OTHERS for frames in (4, 40) for dtype in (fp32, bf16)]
    found += [Case(op, "backward", 40, bf16) for op in OTHERS]
    found += [Case("block", way, frames, dtype) for way in ("forward", "backward") for frames in (4, 40) for dtype in (fp32, bf16)]
    found += [Case(op, "forward", frames, dtype) for op in ("trunk", "model") for frames in FRAMES for dtype in (fp32, bf16)]
    return found


QUICK = [Case("mask_attention", "forward", 1, torch.float32), Case("qk_norm_rope", "forward", 1, torch.float32)]


@dataclass(frozen=True)
class Variant:
    """`call(inputs)` computes; `biased` is False for one that leaves the mask out, a bound rather than a competitor."""

    name: str
    call: Callable[[Any], Any]
    biased: bool = True


# --- attention ---------------------------------------------------------------------------------------------------------------


def _ours(inputs: AttentionInputs, backend: str, promise: bool = True) -> Any:
    vectors = inputs.query_gate, inputs.key_bias
    return mask_attention(inputs.q, inputs.k, inputs.v, *vectors, layout=inputs.layout if promise else None, backend=backend)


def _ours_without_mask(inputs: AttentionInputs, backend: str) -> Any:
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
        if backend.missing() or backend.name == "reference" or (backend.name == "flex" and case.direction == "backward"):
            continue
        found.append(Variant(backend.name, functools.partial(_ours, backend=backend.name)))
    if device == "cuda":
        for name in ("triton", "cuda"):
            if not ATTENTION.get(name).missing():
                found.append(Variant(f"{name}, no layout", functools.partial(_ours, backend=name, promise=False)))
                found.append(Variant(f"{name} without mask", functools.partial(_ours_without_mask, backend=name), biased=False))
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            which = kernel.name.removesuffix("_ATTENTION").lower()
            found.append(Variant(f"torch sdpa ({which}) without mask", functools.partial(_torch_without_mask, kernel=kernel), biased=False))
    if case.tokens**2 * case.dtype.itemsize <= DENSE_BYTES:
        found.append(Variant("torch sdpa, dense bias", _dense_bias))
    return found


def attention_case(case: Case, device: str, heads: int) -> AttentionInputs:
    layout = TokenLayout(case.frames, PER_FRAME, SPECIAL)
    return attention_inputs(layout, heads=heads, head_dim=case.head_dim, dtype=case.dtype, device=device, packed=True)


# --- the other ops -----------------------------------------------------------------------------------------------------------


def _head_inputs(case: Case, device: str, frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels, hidden = case.heads * case.head_dim, HIDDEN
    tokens = torch.randn(1, frames, PER_FRAME, channels, generator=generator) * 3 + 1
    shapes = [(channels, 1, 3, 3), (channels,), (hidden, channels, 1, 1), (hidden,), (1, hidden, 1, 1), (1,)]
    parameters = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    return [tokens.to(device, case.dtype), *(p.to(device) for p in parameters)]


def _head(tensors: list[Tensor], backend: str) -> Tensor:
    return mask_head(*tensors, grid=GRID, special_tokens=SPECIAL, backend=backend)


def _rope_inputs(case: Case, device: str, frames: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, frames * PER_FRAME, 3, case.heads, case.head_dim, generator=generator)
    vectors = [torch.randn(case.head_dim, generator=generator) for _ in range(4)]
    return [*(x.to(device, case.dtype) for x in (qkv, *vectors)), *rope_tables(GRID, case.head_dim, device=device)]


def _rope(tensors: list[Tensor], backend: str) -> Any:
    q, k, _ = qk_norm_rope(*tensors, grid=GRID, special_tokens=SPECIAL, backend=backend)
    return torch.stack([q, k]) if torch.is_grad_enabled() else (q, k)


def _residual_inputs(case: Case, device: str, frames: int) -> list[Tensor]:
    """As in the trunk: the stream and the parameters in fp32, the branch in the case's dtype."""
    generator = torch.Generator().manual_seed(0)
    channels = case.heads * case.head_dim
    x, branch = (torch.randn(1, frames * PER_FRAME, channels, generator=generator) for _ in range(2))
    vectors = [torch.randn(channels, generator=generator) for _ in range(3)]
    return [x.to(device), branch.to(device, case.dtype), *(vector.to(device) for vector in vectors)]


def _residual(tensors: list[Tensor], backend: str) -> Any:
    total, normal = residual_norm(*tensors, dtype=tensors[1].dtype, backend=backend)
    return normal if torch.is_grad_enabled() else (total, normal)


@dataclass(frozen=True)
class Other:
    """An op that memory traffic binds: its inputs are a list of tensors, of which some get gradients."""

    registry: Registry
    inputs: Callable[[Case, str, int], list[Tensor]]
    call: Callable[..., Any]
    leaves: slice
    bytes: Callable[[Case], float]


OTHERS = {
    "mask_head": Other(
        MASK_HEAD,
        _head_inputs,
        _head,
        slice(1, None),
        lambda case: formulas.mask_head_bytes(case.frames * GRID[0] * GRID[1], case.heads * case.head_dim, case.dtype.itemsize),
    ),
    "qk_norm_rope": Other(
        QK_NORM_ROPE,
        _rope_inputs,
        _rope,
        slice(5),
        lambda case: formulas.qk_norm_rope_bytes(case.tokens, case.heads, case.head_dim, case.dtype.itemsize, case.direction),
    ),
    "residual_norm": Other(
        RESIDUAL_NORM,
        _residual_inputs,
        _residual,
        slice(None),
        lambda case: formulas.residual_norm_bytes(case.tokens, case.heads * case.head_dim, case.dtype.itemsize, case.direction),
    ),
}


def variants(case: Case, device: str) -> list[Variant]:
    if case.op in whole.OUTPUTS:
        return [Variant("page4d", whole.ours), Variant("official arithmetic", whole.official_arithmetic)]
    if case.op == "block":
        return [Variant("page4d", whole.our_block), Variant("official arithmetic", whole.official_block)]
    if case.op == "mask_attention":
        return attention_variants(case, device)
    op = OTHERS[case.op]
    return [Variant(backend.name, functools.partial(op.call, backend=backend.name)) for backend in op.registry if not backend.missing()]


def inputs(case: Case, device: str, small: bool = False) -> Any:
    """The case's inputs; `small`: one head or one frame of them, for the gate."""
    if case.op in whole.OUTPUTS:
        return whole.make_inputs(case.op, case.frames, case.dtype, device, small)
    if case.op == "block":
        return whole.make_block_inputs(1 if small else case.frames, case.dtype, device)
    if case.op == "mask_attention":
        return attention_case(case, device, 1 if small else case.heads)
    return OTHERS[case.op].inputs(case, device, 1 if small else case.frames)


# --- what is run and compared ------------------------------------------------------------------------------------------------


def leaves(case: Case, given: Any) -> list[Tensor]:
    """The tensors that get gradients."""
    if case.op == "mask_attention":
        return [x for x in given.tensors() if x is not None]
    if case.op == "block":
        return [given.x]  # as in a block whose weights are frozen
    return given[OTHERS[case.op].leaves]


def prepare(case: Case, variant: Variant, given: Any) -> Callable[[], Any]:
    """One call of what is timed: the forward without autograd, or the backward alone."""
    if case.direction == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return variant.call(given)

        return forward
    roots = [x.requires_grad_() for x in leaves(case, given)]
    out = variant.call(given)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return lambda: torch.autograd.grad(out, roots, d_out, retain_graph=True, allow_unused=True)


def upcast(case: Case, given: Any, dtype: torch.dtype) -> Any:
    return given.to(dtype) if not isinstance(given, list) else [x.detach().to(dtype) for x in given]


def oracle(case: Case, variant: Variant, given: Any) -> Any:
    """What the gate compares with: the chunked or plain reference in float64 (fp32 for long backwards, where float64 takes minutes)."""
    dtype = torch.float64 if case.direction == "forward" or case.tokens < 5000 else torch.float32
    exact = upcast(case, given, dtype)
    call: Callable[[Any], Any]
    if case.op in whole.OUTPUTS:
        call = whole.ours
    elif case.op == "block":
        call = whole.our_block
    elif case.op != "mask_attention":
        call = functools.partial(OTHERS[case.op].call, backend="reference")
    elif variant.biased:
        call = functools.partial(_ours, backend="chunked")
    else:
        call = functools.partial(_ours_without_mask, backend="chunked")
    return prepare(case, Variant("oracle", call, variant.biased), exact)()


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a variant in words, or nothing; its largest error and, of attention, that of the gated rows, of their norm."""

    reason: str
    error: float | None = None
    gated_error: float | None = None


def gate(case: Case, variant: Variant, given: Any) -> Verdict:
    """Whether the variant agrees with the oracle on `given`."""
    found, exact = prepare(case, variant, given)(), oracle(case, variant, given)
    pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
    tolerance = BF16_ERROR[case.direction] if case.dtype != torch.float32 else 1e-3
    if variant.name == "sdpa_augmented" and case.dtype != torch.float32:
        tolerance *= 10  # it rounds gate and bias to bf16: up to 0.12 in a logit
    names = {"forward": "output", "backward": "gradient"}
    errors = []
    for index, (x, y) in enumerate(pairs):
        name = f"{names[case.direction]} {index}"
        if x is None or y is None:
            if x is not y:
                return Verdict(f"{name} is missing")
            continue
        if case.op == "mask_attention" and isinstance(found, tuple) and index == 3:  # with a layout the rest of the gate is constant
            x, y = given.layout.only_special(x), given.layout.only_special(y)
        errors.append(_distance(x, y))
        if not errors[-1] <= tolerance:
            return Verdict(f"{name} is off by {errors[-1]:.1e} (allowed {tolerance:.0e})", errors[-1])
    gated = None
    if case.op == "mask_attention" and case.direction == "forward" and variant.biased:
        gated = _distance(*(x.unflatten(2, (case.frames, PER_FRAME))[:, :, :, :SPECIAL] for x in (found, exact)))
    return Verdict("", max(errors), gated)


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())
