"""Memory of a pass without gradients: as planned, within a budget, and what happens when it runs out all the same."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from page4d.config import preset
from page4d.lean import Lean
from page4d.memory import Plan, Workload, budget_of, make_plan, predicted_bytes
from page4d.model import Page4D
from page4d_kernels import use_backend


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still alive; kernels' own working space is not seen."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    dense = preset("page4d").depth_head
    config = preset("small").replace(embed_dim=256, depth=6, masked_blocks=(2, 4), mask_after=2, kept_layers=(1, 2, 3, 5), track=None)
    config = config.replace(
        depth_head=replace(dense, out_channels=(64, 128, 256, 256)), point_head=replace(dense, out_channels=(64, 128, 256, 256))
    )
    return Page4D(config).eval()


CASES = {
    "camera": (1, 12, (112, 154), {"camera"}),
    "depth": (1, 6, (112, 154), {"camera", "depth"}),
    "all": (1, 4, (112, 154), {"camera", "depth", "points", "mask"}),
    "batch": (2, 5, (112, 154), {"camera", "depth"}),
    "long": (1, 40, (56, 84), {"camera", "depth"}),
}


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_is_allocated(model, case, dtype, budget, monkeypatch):
    monkeypatch.setattr("page4d.memory.PIECE_TOKENS", 300)
    batch, frames, size, outputs = CASES[case]
    images = torch.rand(batch, frames, 3, *size)
    model.set_compute_dtype(dtype)
    with torch.no_grad(), use_backend("sdpa"):
        plan = model.plan(images.shape, outputs, budget)
        model(images, outputs=outputs, memory_budget=budget)  # makes the tables
        with LiveBytes(*model.parameters(), *model.buffers()) as live:
            model(images, outputs=outputs, memory_budget=budget)
    measured = live.peak
    print(f"{case} {dtype} {plan}: measured {measured / 2**20:.1f} MiB, planned {plan.bytes / 2**20:.1f}: {plan.bytes / measured:.3f}")
    assert 0.9 <= plan.bytes / measured <= 1.1
