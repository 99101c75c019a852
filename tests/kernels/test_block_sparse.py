"""The reference of block-sparse attention: against dense attention, and row by row."""

from __future__ import annotations

import pytest
import torch

from page4d_kernels import TokenLayout
from page4d_kernels.reference.block_sparse import block_sparse_attention
from page4d_kernels.reference.mask_attention import mask_attention

LAYOUT = TokenLayout(3, 9, 2)  # 21 patches: the last blocks are smaller
SCALE = 0.25


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, LAYOUT.tokens, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    gate = LAYOUT.only_special(torch.full((2, LAYOUT.tokens), 8.0, dtype=torch.float64))
    return q, k, v, gate, torch.rand(2, LAYOUT.tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("choice", [{"share": 1.1, "floor": 0}, {"share": 0, "floor": 1}], ids=str)
def test_all_blocks_are_dense_attention(inputs, choice):
    q, k, v, gate, bias = inputs
    out, computed = block_sparse_attention(q, k, v, LAYOUT, gate, bias, SCALE, blocks=(4, 2), **choice)
    assert (out - mask_attention(q, k, v, gate, bias, SCALE)[0]).abs().max() < 1e-14 and computed == 1


@pytest.mark.parametrize(("share", "floor"), [(0.5, 0.0), (0.3, 0.4), (0.0, 0.25)])
def test_row_by_row(inputs, share, floor):
    q, k, v, gate, bias = inputs
    out, computed = block_sparse_attention(q, k, v, LAYOUT, gate, bias, SCALE, blocks=(4, 2), share=share, floor=floor)
    dense, _ = mask_attention(q, k, v, gate, bias, SCALE)
    special = [token for token in range(LAYOUT.tokens) if token % 9 < 2]
    patches = [token for token in range(LAYOUT.tokens) if token % 9 >= 2]
    assert torch.equal(out[:, :, special], dense[:, :, special])
    queries = [patches[start : start + 4] for start in range(0, 21, 4)]
    keys = [patches[start : start + 2] for start in range(0, 21, 2)]
    pairs = 0
    for b in range(2):
        for h in range(2):
            for rows in queries:
                means = torch.stack([q[b, h, rows].mean(0) @ k[b, h, columns].mean(0) * SCALE for columns in keys]).softmax(0)
                seen, total = list(special), 0.0
                for rank, block in enumerate(means.argsort(descending=True).tolist()):
                    if total >= share and rank >= floor * len(keys):
                        break
                    total += float(means[block])
                    seen += keys[block]
                pairs += len(rows) * (len(seen) - len(special))
                expected = (q[b, h, rows] @ k[b, h, seen].T * SCALE).softmax(-1) @ v[b, h, seen]
                assert (out[b, h, rows] - expected).abs().max() < 1e-14
    assert float(computed) == pytest.approx(pairs / (4 * 21 * 21))
