"""Muon: the parameters it updates, and its steps against those of torch."""

from __future__ import annotations

import pytest
import torch

from page4d.config import preset
from page4d.model import Page4D
from page4d.training.config import OptimizerConfig
from page4d.training.muon import Muon, orthogonalise
from page4d.training.parameters import make_optimizers


def test_muon_takes_the_matrices_of_blocks():
    """All of them and nothing else. Its steps are as large as AdamW's, whatever the shape and magnitude of the gradient."""
    model = Page4D(preset("nano"))
    adamw, muon = make_optimizers(model.named_parameters(), OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.0))
    matrices = {id(p) for group in muon.param_groups for p in group["params"]}
    blocks = (
        *model.aggregator.frame_blocks,
        *model.aggregator.global_blocks,
        *model.aggregator.patch_embed.blocks,
        *model.camera_head.trunk,
    )
    wanted = {id(p) for block in blocks for p in block.parameters() if p.dim() == 2}
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert matrices == wanted and not wanted & {id(p) for p in rest}
    assert len(rest) + len(wanted) == sum(p.requires_grad for p in model.parameters())
    weight = model.aggregator.frame_blocks[0].mlp.fc1.weight
    before = weight.detach().clone()
    weight.grad = 1e-6 * torch.randn_like(weight) * torch.logspace(0, -1, weight.shape[1])
    muon.step()
    moved = (weight.detach() - before) / 1e-2
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)
    values = torch.linalg.svdvals(moved)
    assert float(values.max() / values.min()) < 4 and float(torch.linalg.cond(weight.grad)) > 10


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (16, 16)], ids=str)
def test_orthogonalising_keeps_singular_vectors_and_evens_out_singular_values(shape):
    """Singular values of very different size become about 1. A zero matrix stays zero."""
    (u, _, vt), values = torch.linalg.svd(torch.randn(shape), full_matrices=False), torch.logspace(0, -1.5, 16)
    found = u.mT @ orthogonalise(u @ values.diag() @ vt) @ vt.mT
    assert torch.allclose(found, found.diagonal().diag(), atol=1e-4)
    assert found.diagonal().min() > 0.68 and found.diagonal().max() < 1.21
    assert not orthogonalise(torch.zeros(shape)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(48, 16), (16, 48)], ids=str)
def test_steps_are_those_of_torch(shape):
    """Five steps with weight decay equal torch's, except that torch has bf16 matmuls."""
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.95}
    optimizers = Muon([{"params": [ours]}], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(5):
        gradient = torch.randn(shape)
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.01 * (theirs - start).norm()
