"""Attention of patches over some of the keys: against all logits in float64, and against dense attention where they agree."""

from __future__ import annotations

import pytest
import torch

from page4d_kernels import TokenLayout, frame_attention, mask_attention, select_keys, thin_attention
from page4d_kernels.reference import thin_attention as reference
from page4d_kernels.reference.mask_attention import mask_attention as reference_attention

CASES = [  # frames, grid, special tokens, cell, batch, shift
    (3, (4, 6), 5, (2, 2), 1, 0),
    (4, (5, 7), 2, (2, 2), 2, 3),  # some cells are larger
    (3, (1, 9), 1, (2, 2), 1, 1),
    (5, (3, 3), 0, (3, 3), 2, 2),
    (2, (2, 3), 4, (9, 9), 1, 0),  # one cell
    (3, (4, 4), 1, (1, 2), 1, 5),
]
BACKENDS = ["reference", "chunked", "cpu", "sdpa"]


def made(case, dtype=torch.float32, seed=0):
    frames, grid, special, _, batch, _ = case
    layout = TokenLayout(frames, special + grid[0] * grid[1], special)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, 2, layout.tokens, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.rand(batch, layout.tokens, generator=generator, dtype=torch.float64) - 0.5
    gate = layout.only_special(torch.full((batch, layout.tokens), 8.0, dtype=torch.float64))
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    return layout, q.to(dtype), k.to(dtype), v.to(dtype), gate.to(vectors), bias.to(vectors)


def counts(case, layout: TokenLayout) -> torch.Tensor:
    """(N, N): how many tokens a key stands for in a row, cell by cell."""
    frames, (rows, columns), special, (height, width), _, shift = case
    found = torch.zeros(layout.tokens)
    for frame in range(frames):
        start = frame * layout.tokens_per_frame
        found[start : start + special] = 1
        patches = found[start + special : start + layout.tokens_per_frame].view(rows, columns)
        if frame == 0:
            patches.fill_(1)
            continue
        tall, wide = max(1, rows // height), max(1, columns // width)
        for i in range(tall):
            for j in range(wide):
                cell = patches[i * rows // tall : (i + 1) * rows // tall, j * columns // wide : (j + 1) * columns // wide]
                place = (frame - 1 + shift) % cell.numel()
                cell[place // cell.shape[1], place % cell.shape[1]] = cell.numel()
    return found.expand(layout.tokens, -1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_which_keys_are_kept(case):
    layout = made(case)[0]
    selection = select_keys(layout, case[1], case[3], case[5])
    expected = counts(case, layout)[0]
    assert torch.equal(selection.kept, expected.nonzero()[:, 0])
    assert torch.allclose(selection.log_counts.exp().float(), expected[selection.kept])
    assert expected.sum() == layout.tokens, "every token is stood for once"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_all_logits(case, masked, backend):
    layout, q, k, v, gate, bias = made(case)
    vectors = (gate, bias) if masked and layout.special_tokens else (None, None)
    selection = select_keys(layout, case[1], case[3], case[5])
    out = thin_attention(q, k, v, selection, *vectors, backend=backend)
    expected = reference.thin_attention(q, k, v, counts(case, layout), layout, *vectors, 16**-0.5)
    assert (out - expected).abs().max() < 3e-6 and out.shape == q.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_as_close_as_dense_attention(backend):
    case = CASES[1]
    layout, q, k, v, gate, bias = made(case, torch.bfloat16)
    selection = select_keys(layout, case[1], case[3], case[5])
    expected = reference.thin_attention(q.double(), k.double(), v.double(), counts(case, layout), layout, gate, bias, 16**-0.5)
    error = (thin_attention(q, k, v, selection, gate, bias, backend=backend).double() - expected).abs().max()
    exact = torch.softmax(q.double() @ k.double().transpose(-1, -2) * 16**-0.5, -1) @ v.double()
    usual = (mask_attention(q, k, v, backend="sdpa").double() - exact).abs().max()
    assert error <= 2 * usual + 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cells_of_one_patch_and_single_frames_are_dense(case, backend):
    grid = case[1]
    layout, q, k, v, gate, bias = made(case)
    dense = mask_attention(q, k, v, gate, bias, layout=layout, backend=backend)
    out = thin_attention(q, k, v, select_keys(layout, grid, (1, 1)), gate, bias, backend=backend)
    assert (out - dense).abs().max() < 3e-6
    one = TokenLayout(1, layout.tokens_per_frame, layout.special_tokens)
    first = [x[:, :, : one.tokens] for x in (q, k, v)]
    vectors = gate[:, : one.tokens], bias[:, : one.tokens]
    dense = mask_attention(*first, *vectors, layout=one, backend=backend)
    assert (thin_attention(*first, select_keys(one, grid, case[3]), *vectors, backend=backend) - dense).abs().max() < 3e-6
    assert (frame_attention(*first, one, *vectors, backend=backend) - dense).abs().max() < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_special_rows_are_dense_to_the_bit_and_repeat(backend, masked):
    """As the same backend computes these rows over all keys."""
    case = CASES[0]
    layout, q, k, v, gate, bias = made(case)
    vectors = (gate, bias) if masked else (None, None)
    rows = None if not masked else layout.special(gate, 1)
    dense = mask_attention(layout.special(q, 2), k, v, rows, vectors[1], backend=backend)
    selection = select_keys(layout, case[1], case[3])
    for attend in (
        lambda: thin_attention(q, k, v, selection, *vectors, backend=backend),
        lambda: frame_attention(q, k, v, layout, *vectors, backend=backend),
    ):
        out = attend()
        assert torch.equal(layout.special(out, 2), dense) and torch.equal(out, attend())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_rows_that_are_also_dense(case, masked, backend):
    """The patch rows that are asked for, without the mask; the rest keeps its bits."""
    layout, q, k, v, gate, bias = made(case)
    vectors = (gate, bias) if masked and layout.special_tokens else (None, None)
    selection = select_keys(layout, case[1], case[3])
    patches = (torch.arange(layout.tokens) % layout.tokens_per_frame >= layout.special_tokens).nonzero()[:, 0]
    some = patches[[3, 0, 7]]
    expected, _ = reference_attention(q[:, :, some].double(), k.double(), v.double(), None, None, 0.25)
    for attend, of in ((thin_attention, selection), (frame_attention, layout)):
        out, dense = attend(q, k, v, of, *vectors, backend=backend, dense_rows=some)
        assert (dense - expected).abs().max() < 3e-6
        assert torch.equal(out, attend(q, k, v, of, *vectors, backend=backend))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([3], "must be a tensor"),
        (torch.tensor([[3]]), "1 dimensions"),
        (torch.tensor([3.0]), "int64"),
        (torch.tensor([], dtype=torch.int64), "at least one"),
        (torch.tensor([0]), "rows of patches"),
        (torch.tensor([-1]), "rows of patches"),
        (torch.tensor([10**6]), "rows of patches"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_dense(rows, words):
    layout, q, k, v, _, _ = made(CASES[0])
    for attend, of in ((thin_attention, select_keys(layout, (4, 6), (2, 2))), (frame_attention, layout)):
        with pytest.raises((TypeError, ValueError), match=words):
            attend(q, k, v, of, dense_rows=rows)
        with pytest.raises(TypeError, match=r"must be a (KeySelection|TokenLayout)"):
            attend(q, k, v, (2, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frame_attention(backend):
    case = CASES[1]
    layout, q, k, v, gate, bias = made(case)
    own = torch.block_diag(*[torch.ones(layout.tokens_per_frame, layout.tokens_per_frame)] * layout.frames)
    expected = reference.thin_attention(q, k, v, own, layout, gate, bias, 16**-0.5)
    assert (frame_attention(q, k, v, layout, gate, bias, backend=backend) - expected).abs().max() < 3e-6


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"), [("chunked", torch.float64, 1e-10), ("cpu", torch.float32, 2e-5), ("sdpa", torch.float32, 2e-5)]
)
@pytest.mark.parametrize("attend", ["thin", "frame"])
def test_gradients(attend, backend, dtype, tolerance):
    case = CASES[1]
    layout, *inputs = made(case, dtype)
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    n = counts(case, layout) if attend == "thin" else torch.block_diag(*[torch.ones(layout.tokens_per_frame, layout.tokens_per_frame)] * 4)
    selection = select_keys(layout, case[1], case[3], case[5])
    q, k, v, gate, bias = inputs
    out = (
        thin_attention(q, k, v, selection, gate, bias, backend=backend)
        if attend == "thin"
        else frame_attention(q, k, v, layout, gate, bias, backend=backend)
    )
    expected = reference.thin_attention(*exact[:3], n, layout, *exact[3:], 16**-0.5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad((out * weights.to(dtype)).sum(), inputs)
    for mine, theirs in zip(ours, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert (mine - theirs).abs().max() < tolerance * max(1, float(theirs.abs().max()))


def test_the_kept_place_moves_from_frame_to_frame():
    layout = TokenLayout(6, 16, 0)
    kept = select_keys(layout, (4, 4), (2, 2)).kept
    firsts = [int(kept[(kept >= 16 * frame) & (kept < 16 * frame + 16)].min()) - 16 * frame for frame in range(1, 6)]
    assert firsts == [0, 1, 4, 5, 0]
    assert len(kept) == 16 + 5 * 4


def test_mistakes():
    layout = TokenLayout(2, 9, 3)
    with pytest.raises(ValueError, match="a grid of 2 x 2 patches does not fit"):
        select_keys(layout, (2, 2), (2, 2))
    with pytest.raises(ValueError, match="at least one row and one column, not 0 x 2"):
        select_keys(layout, (2, 3), (0, 2))
    q = torch.randn(1, 1, 17, 8)
    with pytest.raises(ValueError, match="q must be"):
        thin_attention(q, q, q, select_keys(layout, (2, 3), (2, 2)))
