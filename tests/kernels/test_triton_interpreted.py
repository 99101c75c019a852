"""The Triton kernels in Triton's interpreter: the shared suite of `test_mask_attention.py`, and paths of their own.

The interpreter is chosen when Triton is imported, so a plain run of pytest starts a second one for these.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from page4d_kernels import TokenLayout, mask_attention, mask_head, qk_norm_rope, rope_tables
from page4d_kernels.testing import attention_inputs

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the second run")
def test_in_a_process_of_its_own():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton and not compiles and not repeats and not 893",
        str(HERE),
    ]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=HERE.parents[1])
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: see test_in_a_process_of_its_own")
class TestInterpretedTriton:
    @pytest.mark.parametrize("promise", [True, False, None], ids=["layout", "no layout", "no bias"])
    def test_split_keys(self, promise, monkeypatch):
        """Few query tiles: three programs share the keys of each and are merged."""
        from page4d_kernels.triton import mask_attention_launch as launch

        monkeypatch.setattr(launch, "splits_for", lambda tiles, keys: 3)
        inputs = attention_inputs(TokenLayout(3, 59, 5), batch=2, packed=True)
        vectors = (None, None) if promise is None else (inputs.query_gate, inputs.key_bias)
        found, expected = (
            mask_attention(inputs.q, inputs.k, inputs.v, *vectors, layout=inputs.layout if promise else None, backend=name, return_lse=True)
            for name in ("triton", "reference")
        )
        for x, y in zip(found, expected, strict=True):
            assert torch.allclose(x, y, atol=2e-5)

    def test_gradients_with_split_keys(self, monkeypatch):
        """The gated rows' dq and dr are sums over three programs' shares of the keys.

        One batch entry has gates so small that the special rows, read without their bias as well, would count twice in dk and dv.
        """
        from page4d_kernels.triton import mask_attention_launch as launch

        monkeypatch.setattr(launch, "splits_for", lambda tiles, keys: 3)
        inputs = attention_inputs(TokenLayout(3, 23, 5), batch=2, heads=1, head_dim=16, packed=True)
        inputs.query_gate[1] *= 0.01
        inputs = inputs.requires_grad_()
        out, expected = (mask_attention(*inputs.tensors(), layout=inputs.layout, backend=name) for name in ("triton", "reference"))
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        gradients = (torch.autograd.grad(x, inputs.tensors(), d_out) for x in (out, expected))
        for x, y in zip(*gradients, strict=True):
            assert (x - y).abs().max() <= 2e-5 * max(1.0, y.abs().max().item())

    def test_more_splits_than_tiles_of_keys(self, monkeypatch):
        from page4d_kernels.triton import mask_attention_launch as launch

        monkeypatch.setattr(launch, "splits_for", lambda tiles, keys: 5)
        inputs = attention_inputs(TokenLayout(1, 40, 5))
        found, expected = (mask_attention(*inputs.tensors(), layout=inputs.layout, backend=name) for name in ("triton", "reference"))
        assert torch.allclose(found, expected, atol=2e-5)

    def test_descriptors(self, monkeypatch):
        """The path with tensor descriptors (TMA), tails included."""
        from page4d_kernels.triton import mask_attention_launch as launch

        monkeypatch.setattr(launch, "_tma_ready", lambda *tensors: True)
        inputs = attention_inputs(TokenLayout(3, 59, 5), batch=2, packed=True).requires_grad_()
        out, expected = (mask_attention(*inputs.tensors(), layout=inputs.layout, backend=name) for name in ("triton", "reference"))
        assert torch.allclose(out, expected, atol=2e-5)
        d_out = torch.randn_like(out)
        gradients = (torch.autograd.grad(x, inputs.tensors(), d_out) for x in (out, expected))
        for x, y in zip(*gradients, strict=True):
            # A gate's gradient is a sum of terms as large as the biases, which cancel: rounding goes by the largest, not by each.
            assert (x - y).abs().max() <= 2e-5 * max(1.0, y.abs().max().item())

    def test_a_block_is_one_graph_and_survives_checkpointing(self):
        """Mask head, QK-norm + RoPE and attention in one graph, forward and backward (traced ahead of time, without code generation)."""
        layout, grid = TokenLayout(2, 17, 5), (3, 4)
        generator = torch.Generator().manual_seed(0)
        shapes = [(32, 1, 3, 3), (32,), (16, 32, 1, 1), (16,), (1, 16, 1, 1), (1,)]
        head = [(torch.randn(shape, generator=generator) * 0.3).requires_grad_() for shape in shapes]
        vectors = [torch.randn(16, generator=generator).requires_grad_() for _ in range(4)]
        tables = rope_tables(grid, 16)
        gate = layout.only_special(torch.full((1, layout.tokens), 8.0))
        tokens = torch.randn(1, 2, 17, 32, generator=generator)
        weight = (torch.randn(3 * 32, 32, generator=generator) * 0.2).requires_grad_()

        def block(tokens, weight, backend="triton"):
            bias = mask_head(tokens, *head, grid=grid, special_tokens=5, backend=backend)
            qkv = torch.nn.functional.linear(tokens.flatten(1, 2), weight).unflatten(-1, (3, 2, 16))
            q, k, v = qk_norm_rope(qkv, *vectors, *tables, grid=grid, special_tokens=5, backend=backend)
            return mask_attention(q, k, v, gate, bias, layout=layout, backend=backend)

        def results(function):
            out = function(tokens, weight)
            return [out, *torch.autograd.grad(out.square().sum(), [weight, *head, *vectors])]

        expected = results(functools.partial(block, backend="reference"))
        eager = results(block)
        for x, y in zip(eager, expected, strict=True):
            assert torch.allclose(x, y, atol=1e-5, rtol=1e-3)
        graph = results(torch.compile(block, fullgraph=True, backend="aot_eager"))
        checkpointed = results(lambda *x: torch.utils.checkpoint.checkpoint(block, *x, use_reentrant=False))
        for found in (graph, checkpointed):
            assert all(torch.equal(x, y) for x, y in zip(found, eager, strict=True))

    def test_bfloat16_is_declined_in_the_interpreter(self):
        inputs = attention_inputs(TokenLayout(1, 4, 1), dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
            mask_attention(inputs.q, inputs.k, inputs.v, backend="triton")
