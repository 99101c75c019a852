"""`sdpa` and `chunked` hold neither N x N logits nor a whole copy of q, k or v."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from page4d_kernels import TokenLayout
from page4d_kernels.backends.mask_attention import chunked, sdpa
from page4d_kernels.backends.mask_attention.problem import AttentionArgs
from page4d_kernels.testing import attention_inputs

LAYOUT = TokenLayout(40, 80, 5)  # 3 200 tokens: N^2 is 39 times a whole q with 2 heads of 40


class Outputs(TorchDispatchMode):
    """The elements of every tensor that is newly made, by operator."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function._schema.name[-1] != "_":
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.made.append((str(function), x.numel()))
        return out


@pytest.mark.parametrize("packed", [False, True])
def test_sdpa_makes_one_output_and_a_few_rows(packed):
    inputs = attention_inputs(LAYOUT, head_dim=40, packed=packed)
    with Outputs() as outputs:
        sdpa.BACKEND.forward(AttentionArgs(*inputs.tensors(), LAYOUT, 0.15))
    whole = inputs.q.numel()
    large = [name for name, numel in outputs.made if numel >= whole]
    assert large == ["aten._scaled_dot_product_flash_attention_for_cpu.default"], large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gated_pass_of_sdpa_copies_keys_tile_by_tile(dtype):
    """What `sdpa` hands to `chunked`, which a dispatch mode around the operator cannot see into; packed, with a batch of two."""
    inputs = attention_inputs(LAYOUT, head_dim=40, batch=2, packed=True, dtype=dtype)
    rows, gate = LAYOUT.special(inputs.q, 2), LAYOUT.special(inputs.query_gate, 1)
    with Outputs() as outputs:
        chunked.BACKEND.forward(AttentionArgs(rows, inputs.k, inputs.v, gate, inputs.key_bias, None, 0.15))
    tiles = {numel for name, numel in outputs.made if "copy" in name or "clone" in name}
    assert max(tiles) < inputs.k.numel()


def test_sdpa_backward_is_linear():
    inputs = attention_inputs(LAYOUT, head_dim=40, packed=True).requires_grad_()
    with Outputs() as outputs:
        sdpa.BACKEND.forward(AttentionArgs(*inputs.tensors(), LAYOUT, 0.15)).sum().backward()
    assert max(numel for _, numel in outputs.made) <= 2 * inputs.q.numel()


def test_chunked_stays_within_its_tiles():
    inputs = attention_inputs(LAYOUT, head_dim=40, heads=2)
    with Outputs() as outputs:
        chunked.BACKEND.forward(AttentionArgs(*inputs.tensors(), LAYOUT, 0.15))
    assert LAYOUT.tokens**2 * 2 > 2 * chunked.TILE_LOGITS
    assert max(numel for _, numel in outputs.made) <= chunked.TILE_LOGITS


def test_chunked_backward_stays_within_its_tiles():
    inputs = attention_inputs(LAYOUT, head_dim=40, heads=2)
    out, lse = chunked.BACKEND.forward(AttentionArgs(*inputs.tensors(), LAYOUT, 0.15))
    with Outputs() as outputs:
        chunked.BACKEND.backward(AttentionArgs(*inputs.tensors(), LAYOUT, 0.15), out, lse, torch.ones_like(out), None)
    assert max(numel for _, numel in outputs.made) <= chunked.TILE_LOGITS
