"""The bundled weights on held-out scenes, which neither training nor the figures in docs/nano.md used."""

from __future__ import annotations

import pytest

from page4d import Page4D
from page4d.data.synthetic import SyntheticScenes
from page4d.evaluation import Protocol, evaluate


@pytest.mark.slow
def test_the_bundled_weights_are_far_better_than_chance():
    """The figures in docs/nano.md are measured on many more sequences."""
    model = Page4D.from_pretrained("nano", device="cpu")
    scenes = SyntheticScenes("dynamic", frames=8, size=(56, 84), seed=200, length=24)
    protocol = Protocol((56, 84), alignments=("median",))
    result = evaluate(model, scenes, ["pose", "depth", "mask"], protocol=protocol)
    mean = result["mean"]
    assert result["failed"] == 0
    assert mean["pose"]["ate"] < 0.45 * mean["pose"]["ate_constant"]
    assert mean["depth:median"]["abs_rel"] < 0.2
    assert mean["mask"]["auc"] > 0.8
