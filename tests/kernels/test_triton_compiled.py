"""The Triton kernels compiled for GPUs that are not here, through the real launch path: gates on what the machine code needs."""

from __future__ import annotations

import os

import pytest
import torch

from page4d_kernels import TokenLayout, rope_tables
from page4d_kernels.testing import attention_inputs

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from page4d_kernels.triton import mask_attention_launch as launch
from page4d_kernels.triton import mask_head_launch, qk_norm_rope_launch
from page4d_kernels.triton.dryrun import SHARED_MEMORY, Launch, compiled_kernels, dry_run, resources

KERNELS = {"forward", "preprocess", "backward_rows", "backward_keys"}


def run(capability: int, layout: TokenLayout, promise: bool = True, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16):
    """Launches and compiled kernels of one forward and backward on views of a packed projection."""
    inputs = attention_inputs(layout, head_dim=head_dim, dtype=dtype, packed=True)
    with dry_run(capability) as stand_in, compiled_kernels() as kernels:
        out, lse = launch.forward(*inputs.tensors(), layout if promise else None, 0.125)
        launch.backward(*inputs.tensors(), out, lse, torch.zeros_like(out), None, layout if promise else None, 0.125)
    return stand_in.launches, kernels


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "promise"), [(80, True), (90, True), (90, False), (100, True)])
def test_machine_code(capability, promise):
    _, kernels = run(capability, TokenLayout(10, 893, 5), promise)
    assert set(kernels) == KERNELS
    for name, kernel in kernels.items():
        needs = resources(kernel)
        assert needs.stack == 0 and not needs.instructions["STL"] and not needs.instructions["LDL"], f"{name} spills: {needs}"
        assert needs.shared <= SHARED_MEMORY[capability], f"{name}: {needs}"
        if name == "preprocess":
            continue
        if capability == 80:
            assert needs.instructions["HMMA"] and not needs.instructions["UTMALDG"], f"{name}: {needs}"
        if capability == 90:
            assert needs.instructions["HGMMA"] and needs.instructions["UTMALDG"] and not needs.instructions["HMMA"], f"{name}: {needs}"
        if capability == 100:
            assert needs.instructions["UTMALDG"], f"{name}: {needs}"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_qk_norm_rope_machine_code(capability):
    qkv = torch.empty(1, 2 * 893, 3, 16, 64, dtype=torch.bfloat16)
    weights, tables = [torch.empty(64) for _ in range(4)], rope_tables((24, 37), 64)
    with dry_run(capability) as stand_in, compiled_kernels() as kernels:
        q, k = qk_norm_rope_launch.forward(qkv, *weights, *tables, (24, 37), 5, 1e-5)
        qk_norm_rope_launch.backward(q, k, qkv, weights[0], weights[2], *tables, (24, 37), 5, 1e-5)
    assert stand_in.launches == [Launch(name, (56, 16, 1)) for name in ("forward", "backward")]
    assert all(resources(kernel).stack == 0 for kernel in kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_mask_head_machine_code(capability):
    tokens = torch.empty(1, 2, 893, 1024)
    parameters = [torch.empty(shape) for shape in [(1024, 1, 3, 3), (1024,), (256, 1024, 1, 1), (256,), (1, 256, 1, 1), (1,)]]
    with dry_run(capability) as stand_in, compiled_kernels() as kernels:
        mask_head_launch.forward(tokens, parameters, (24, 37), 5)
    assert stand_in.launches == [Launch("statistics", (2, 32, 1)), Launch("forward", (28, 2, 1))]
    for kernel in kernels.values():
        needs = resources(kernel)
        assert needs.stack == 0 and needs.shared <= SHARED_MEMORY[capability], needs


def test_grids():
    """Gated rows make tiles of their own, 5 * 10 of them one; a short sequence splits its keys."""
    launches, _ = run(90, TokenLayout(10, 893, 5))
    assert launches == [
        Launch("forward", (70 + 1, 2, 1)),
        Launch("preprocess", (140, 2, 1)),
        Launch("backward_rows", (140 + 1, 2, 1)),
        Launch("backward_keys", (140, 2, 1)),
    ]
    launches, _ = run(90, TokenLayout(1, 1374, 5))
    assert launches[:2] == [Launch("forward", (11 + 1, 2, 2)), Launch("merge", (43, 2, 1))]


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, torch.float16), (40, torch.float32), (128, torch.float16)])
def test_other_head_dims_and_dtypes_compile(head_dim, dtype):
    _, kernels = run(90, TokenLayout(2, 300, 5), head_dim=head_dim, dtype=dtype)
    assert set(kernels) >= KERNELS
    assert all(resources(kernel).shared <= SHARED_MEMORY[90] for kernel in kernels.values())
