"""Attention across ranks by itself: values, gradients, bytes, memory."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from page4d import Page4D, preset
from page4d.execution.across import Across, Mesh, shares
from page4d.execution.attention_plan import AttentionPlan
from page4d.execution.memory import Workload
from page4d.execution.parallel import ParallelEagerRunner
from page4d.execution.ranks import Ranks
from page4d.execution.traffic import sent_bytes
from page4d.layers import Modulation, Sparsity
from page4d.layers.attention import Attention
from page4d_kernels import TokenLayout, select_keys, use_backend
from page4d_kernels.testing import LiveBytes, assert_within_budget

GRID, SPECIAL = (3, 4), 5
PER_FRAME = SPECIAL + GRID[0] * GRID[1]
CPU = torch.device("cpu")


def test_the_mesh():
    found = {
        (ranks, heads): (mesh.heads, mesh.rings)
        for ranks in (1, 2, 3, 6, 8, 12, 16, 64)
        for heads in (16, 2)
        for mesh in [Mesh.of(ranks, heads)]
    }
    assert [found[ranks, 16] for ranks in (1, 2, 3, 6, 8, 12, 16, 64)] == [(1, 1), (2, 1), (1, 3), (2, 3), (8, 1), (4, 3), (16, 1), (16, 4)]
    assert [found[ranks, 2] for ranks in (1, 2, 3, 6, 8)] == [(1, 1), (2, 1), (1, 3), (2, 3), (2, 4)]
    assert Mesh.of(64, 16, local=8) == Mesh(8, 8) and Mesh.of(8, 16, local=8) == Mesh(8, 1)
    assert str(Mesh(8, 8)) == "all-to-all of heads among 8 ranks, rings of 8 between them"
    assert shares(7, 3) == [3, 2, 2] and shares(2, 3) == [1, 1, 0]


def inputs(frames, batch, heads, dtype, kind):
    """q, k, v (B, H, N, D), gate and bias (B, N), and what the patches do not see."""
    generator = torch.Generator().manual_seed(5)
    layout = TokenLayout(frames, PER_FRAME, SPECIAL)
    q, k, v = torch.randn(3, batch, heads, layout.tokens, 8, generator=generator, dtype=torch.float64).to(dtype)
    gate = layout.only_special(torch.rand(batch, layout.tokens, generator=generator, dtype=torch.float64).to(dtype) * 20)
    bias = torch.rand(batch, layout.tokens, generator=generator, dtype=torch.float64).to(dtype) - 0.5
    checked = torch.tensor([7, PER_FRAME + 9, layout.tokens - 1])
    sparsity = None
    if kind in ("frame", "thin"):
        sparsity = Sparsity(layout, select_keys(layout, GRID, (2, 2), 1) if kind == "thin" else None, checked)
    return [q, k, v, gate, bias], layout, sparsity


def attend(group, frames, heads, kind, batch, dtype, gradients, backend):
    """Outputs of this rank's frames, gradients of its q, k, v and of all of r and c, with sum(out * weights) over all ranks as the loss."""
    (q, k, v, gate, bias), layout, sparsity = inputs(frames, batch, heads, dtype, kind)
    ranks = Ranks.of(group, CPU)
    across = Across(ranks, tuple(shares(frames, ranks.size)), Mesh.of(ranks.size, heads))
    rows = slice(across.own.start * PER_FRAME, across.own.stop * PER_FRAME)
    leaves = [x.clone().requires_grad_(gradients) for x in (q[:, :, rows], k[:, :, rows], v[:, :, rows], gate, bias)]
    module = Attention(heads * 8, heads, backend=backend)
    modulation = None if kind == "plain" else Modulation(leaves[3], leaves[4], layout)
    out = ParallelEagerRunner(None, across)._attend(module, *leaves[:3], modulation, sparsity)
    if not gradients:
        return out.detach(), None
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)[:, :, rows]
    found = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    return out.detach(), found


def expected(frames, heads, kind, batch, dtype, backend="reference"):
    (q, k, v, gate, bias), layout, sparsity = inputs(frames, batch, heads, dtype, kind)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, gate, bias)]
    module = Attention(heads * 8, heads, backend=backend)
    out, _ = module.attend(*leaves[:3], None if kind == "plain" else Modulation(leaves[3], leaves[4], layout), sparsity)
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)


@pytest.mark.parametrize("kind", ["plain", "mask", "frame", "thin"])
@pytest.mark.parametrize(("ranks", "heads"), [(2, 2), (3, 2), (4, 2), (4, 4)], ids=str)
@pytest.mark.parametrize(("frames", "batch"), [(5, 1), (4, 2)], ids=str)
def test_gradients_in_float64(team, ranks, heads, kind, frames, batch):
    """Of q, k, v, r and c: all-to-all, a ring, and both. 5 frames are not divisible by 2, 3 or 4."""
    parts = team.run(ranks, attend, frames, heads, kind, batch, torch.float64, True, "reference")
    out, gradients = expected(frames, heads, kind, batch, torch.float64)
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 2), out, rtol=0, atol=1e-12)
    for i, name in enumerate("qkv"):
        torch.testing.assert_close(torch.cat([part[1][i] for part in parts], 2), gradients[i], rtol=0, atol=1e-12, msg=name)
    for i in (3, 4):
        if kind == "plain":
            continue
        found = sum(part[1][i] for part in parts)
        found = TokenLayout(frames, PER_FRAME, SPECIAL).only_special(found) if i == 3 else found
        wanted = TokenLayout(frames, PER_FRAME, SPECIAL).only_special(gradients[i]) if i == 3 else gradients[i]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        assert float(wanted.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["plain", "mask", "frame", "thin"])
@pytest.mark.parametrize(
    ("ranks", "heads", "backend"), [(2, 2, "sdpa"), (3, 2, "cpu"), (3, 2, "chunked"), (3, 2, "sdpa_rows"), (4, 2, "cpu")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_within_the_budget(team, ranks, heads, kind, backend, dtype):
    parts = team.run(ranks, attend, 5, heads, kind, 2, dtype, False, backend)
    found = torch.cat([part[0] for part in parts], 2)
    exact, plain = expected(5, heads, kind, 2, torch.float64)[0], expected(5, heads, kind, 2, dtype, "chunked")[0]
    assert_within_budget(kind, found, exact, plain)


# --- the whole model ----------------------------------------------------------------------------------------------------------------


@functools.cache
def tiny(heads=2, track=False, dtype=torch.float32):
    torch.manual_seed(3)
    small = preset("small")
    config = small.replace(
        track=replace(small.track, levels=3), num_heads=heads, depth=4, masked_blocks=(1, 3), mask_after=1, kept_layers=(0, 1, 2, 3)
    )
    model = Page4D(config if track else config.replace(track=None)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.3)
            elif parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_of(prediction, weights, start):
    total = 0
    for name, weight in weights.items():
        value = getattr(prediction, name)
        dim = 2 if name.endswith("_list") else 1
        total = total + (value * weight.narrow(dim, start, value.shape[dim])).sum()
    return total


def train(group, frames, heads, attention, checkpoint):
    model = tiny(heads, True, torch.float64)
    model.zero_grad(set_to_none=True)
    model.aggregator.checkpoint_activations = checkpoint
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(2, frames, 3, 56, 84, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64) * 50
    shapes = {
        "pose_enc_list": (4, 2, frames, 9),
        "depth": (2, frames, 56, 84, 1),
        "mask": (2, frames, 4, 6),
        "track_list": (4, 2, frames, 3, 2),
    }
    weights = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    counts = shares(frames, 1 if group is None else group.size())
    rank = 0 if group is None else group.rank()
    start = sum(counts[:rank])
    part = images[:, start : start + counts[rank]].clone().requires_grad_()
    prediction = model(part, points, outputs=["camera", "depth", "mask"], mask_strength=8.0, attention=attention, group=group)
    loss = loss_of(prediction, weights, start)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), part.grad, {name: float(x.norm()) for name, x in gradients.items()}, gradients


@pytest.mark.parametrize(
    ("ranks", "heads", "attention", "checkpoint"),
    [(2, 2, None, False), (2, 2, None, True), (3, 2, None, True), (4, 2, "balanced", False)],
    ids=str,
)
def test_gradients_of_a_model_in_float64(team, ranks, heads, attention, checkpoint):
    """Summed over the ranks, they are those of one process: of all weights, of the images; with activation checkpointing too."""
    loss, images, norms, wanted = train(None, 4, heads, attention, False)
    parts = team.run(ranks, train, 4, heads, attention, checkpoint)
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(loss), rel=1e-12)
    errors = {"images": float((torch.cat([part[1] for part in parts], 1) - images).norm() / images.norm())}
    for name, gradient in wanted.items():
        found = sum(part[3][name] for part in parts if name in part[3])
        errors[name] = float((found - gradient).norm()) / max(norms[name], 1e-3)
    resampled = errors.pop("aggregator.patch_embed.pos_embed")  # in fp32, in every dtype
    print(f"{len(errors)} gradients, the worst {max(errors.values()):.1e}, of {max(errors, key=errors.get)}")
    assert len(errors) > 100 and max(errors.values()) <= 1e-12 and resampled <= 1e-6


def counted(group, frames, options, heads, track):
    """Bytes by kind that this rank sent in a pass, and those of the formula."""
    model = tiny(heads, track)
    ranks = Ranks.of(group, CPU)
    ranks.traffic.clear()
    counts = shares(frames, ranks.size)
    start = sum(counts[: ranks.rank])
    images = torch.rand(2, frames, 3, 56, 84)[:, start : start + counts[ranks.rank]]
    points = torch.tensor([[[1.0, 2.0], [30.0, 20.0], [40.0, 50.0]]] * 2) if track else None
    with torch.no_grad():
        prediction = model(images, points, group=group, **options)
    outputs = frozenset(options.get("outputs", ("camera", "depth", "points", "mask"))) | ({"track"} if track else set())
    workload = Workload(model.config, 2, counts[ranks.rank], (56, 84), 4, outputs, points=3 if track else 0)
    mesh = Mesh.of(ranks.size, heads)
    plan = AttentionPlan.of(options.get("attention"), model.config)
    sparse = sum(layer != "dense" for layer in plan.layers)
    formula = sent_bytes(workload, counts, mesh, ranks.rank, options.get("mask_strength", 1) > 0, sparse)
    assert prediction.pose_enc is not None
    return {kind: traffic.bytes for kind, traffic in ranks.traffic.items() if traffic.bytes}, formula


@pytest.mark.parametrize(("ranks", "heads"), [(2, 2), (3, 2), (4, 2), (4, 4)], ids=str)
@pytest.mark.parametrize(
    ("options", "track"),
    [({}, True), ({"mask_strength": 0.0, "outputs": ["camera"]}, False), ({"attention": "balanced"}, False)],
    ids=str,
)
def test_bytes_are_those_of_the_formula(team, ranks, heads, options, track):
    for found, formula in team.run(ranks, counted, 7, options, heads, track):
        assert found == formula and found


def measured(group, dtype, budget, outputs, frames, heads, attention):
    """Peak of the bytes alive in a pass, and the bytes that the plan says."""
    torch.manual_seed(0)
    config = preset("small").replace(
        embed_dim=256, num_heads=heads, depth=6, masked_blocks=(2, 4), mask_after=2, kept_layers=(1, 2, 3, 5), point_head=None, track=None
    )
    model = Page4D(config).eval().set_compute_dtype(dtype)
    counts = shares(frames, group.size())
    images = torch.rand(1, counts[group.rank()], 3, 112, 154)
    options = {"group": group, "outputs": outputs, "memory_budget": budget, "attention": attention}
    with torch.no_grad(), use_backend("cpu"):
        model(images, **options)  # makes the tables
        peaks = []
        for _ in range(8):  # gloo's thread may let go of a buffer a moment after it has said that it is done
            with LiveBytes(*model.parameters(), *model.buffers()) as live:
                model(images, **options)
            peaks.append(live.peak)
    plan = AttentionPlan.of(attention, config)
    planned = model.plan((1, frames, 3, 112, 154), outputs, budget, attention=plan, ranks=group.size())
    return min(peaks), planned.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("ranks", "heads", "attention"), [(1, 4, None), (2, 4, None), (4, 4, None), (4, 2, None), (3, 4, None), (2, 4, "2x2")], ids=str
)
@pytest.mark.parametrize("outputs", [["camera"], ["camera", "depth"]], ids=str)
def test_memory_is_that_of_the_plan(team, ranks, heads, attention, dtype, outputs):
    """Bound by attention, or by kept layers and heads. The first rank has the most frames: the plan is made for it."""
    found = team.run(ranks, measured, dtype, 1, outputs, 32, heads, attention)
    peak, planned = found[0]
    case = f"{ranks} ranks, {heads} heads, {attention}, {dtype}, {outputs}"
    print(f"{case}: planned {planned / 2**20:.1f} MiB, measured {peak / 2**20:.1f}: {planned / peak:.3f}")
    assert 0.9 <= planned / peak <= 1.1
    assert all(peak <= planned * 1.1 for peak, _ in found)
