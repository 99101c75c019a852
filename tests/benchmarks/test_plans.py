"""The plans that are measured beside those of the library, and the commands that measure them."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("benchmarks", reason="the benchmarks belong to the repository, not to the package")

from benchmarks import plan_quality, plan_time
from benchmarks.plan_variants import BlockPlan, BudgetPlan
from page4d.config import preset
from page4d.execution.attention_plan import AttentionPlan
from page4d_kernels import TokenLayout, mask_attention
from page4d_kernels.reference.thin_attention import thin_attention

GRID, LAYOUT = (5, 7), TokenLayout(4, 2 + 35, 2)
CPU = torch.device("cpu")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, LAYOUT.tokens, 16, generator=generator) for _ in range(3))
    gate = LAYOUT.only_special(torch.full((1, LAYOUT.tokens), 8.0))
    return q, k, v, gate, torch.rand(1, LAYOUT.tokens, generator=generator)


@pytest.mark.parametrize("inverted", [False, True])
def test_the_budget_keeps_whole_cells_where_things_move(inputs, inverted):
    """Against all logits, with the counts worked out cell by cell."""
    q, k, v, gate, bias = inputs
    plan = BudgetPlan(((2, 3),), like=(1, 2), inverted=inverted)
    sparse = plan.sparsity(0, LAYOUT, GRID, 0, CPU)
    plain = AttentionPlan(plan.layers).sparsity(0, LAYOUT, GRID, 0, CPU)
    counts = torch.zeros(LAYOUT.tokens).index_put((plain.keys.kept,), plain.keys.log_counts.exp().float())
    before = int((counts > 0).sum())
    cells = []
    for frame in range(1, 4):
        for top, bottom in ((0, 2), (2, 5)):
            for left, right in ((0, 3), (3, 7)):
                patches = [frame * 37 + 2 + row * 7 + column for row in range(top, bottom) for column in range(left, right)]
                cells.append((float(bias[0, patches].mean()), patches))
    cells.sort(reverse=inverted)
    whole = round((15 - 4) * 3 / (35 / 4 - 1))  # 1 x 2 keeps 15 patches of a frame, 2 x 3 keeps 4
    for _, patches in cells[:whole]:
        counts[patches] = 1
    expected = thin_attention(q, k, v, counts.expand(LAYOUT.tokens, -1), LAYOUT, gate, bias, 0.25)
    assert (sparse.attend(q, k, v, gate, bias, "chunked")[0] - expected).abs().max() < 3e-6
    assert int((counts > 0).sum()) == pytest.approx(before + 3 * 11, rel=0.1), "as many keys as with cells of 1 x 2"
    same = plain.attend(q, k, v, None, None, "chunked")[0]
    assert torch.equal(sparse.attend(q, k, v, None, None, "chunked")[0], same), "without a mask there is nothing to choose by"


def test_the_block_plan_computes_what_it_says(inputs):
    q, k, v, gate, bias = inputs
    plan = BlockPlan(("dense",), floor=1.0)
    out = plan.sparsity(0, LAYOUT, GRID, 0, CPU).attend(q, k, v, gate, bias, None)[0]
    assert (out - mask_attention(q, k, v, gate, bias, backend="chunked")).abs().max() < 3e-6
    assert plan.computed == [1.0] and not plan.exact


def test_names_of_plans():
    config = preset("nano")
    names = ["exact", "general balanced", "balanced", "2x3", "frame@1", "3x3@5", "budget:3x3:2x2", "control:3x3:2x2", "blocks:0.5:0.1"]
    parsed = {name: plan_quality.parse_plan(name, config) for name in names}
    assert (
        parsed["general balanced"] == AttentionPlan.general("balanced", 6) != parsed["balanced"] == AttentionPlan.preset("balanced", config)
    )
    assert parsed["2x3"].layers == ((2, 3),) * 6
    assert parsed["frame@1"].layers == ("dense", "frame", *["dense"] * 4) and parsed["3x3@5"].layers == (*["dense"] * 5, (3, 3))
    assert parsed["budget:3x3:2x2"] == BudgetPlan(((3, 3),) * 6, "budget:3x3:2x2", like=(2, 2))
    assert parsed["control:3x3:2x2"].inverted and (parsed["blocks:0.5:0.1"].share, parsed["blocks:0.5:0.1"].floor) == (0.5, 0.1)


def test_paired_differences():
    mean, difference, error = plan_quality.compared([1.1, 2.3, float("nan")], [1.0, 2.0, 5.0])
    assert mean == pytest.approx(1.7) and difference == pytest.approx(100 * 0.2 / 1.5) and error == pytest.approx(100 * 0.1 / 1.5)
    assert all(math.isnan(value) for value in plan_quality.compared([math.nan], [math.nan]))
    assert plan_quality.rank_correlation([1, 2, 3, 9], [0.1, 0.2, 0.7, 0.8]) == pytest.approx(1)
    assert plan_quality.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_the_table_of_warnings():
    plans = {"exact": AttentionPlan(("dense",)), "2x2": AttentionPlan(((2, 2),)), "frame": AttentionPlan(("frame",))}
    exact = [{"ATE": 1.0}, {"ATE": 2.0}, {"ATE": 0.0}]
    cells = [{"ATE": 1.2, "layer 0": 0.01}, {"ATE": 2.0, "layer 0": 0.04}, {"ATE": 3.0, "layer 0": 0.04}]
    found = {"exact": exact, "2x2": cells, "frame": [{"ATE": 9.0, "layer 0": 9.0}] * 3}
    assert plan_quality.warnings(found, plans).splitlines()[2:] == ["| 0 to 0.05 | 2 | 10.0% | 50% |"]
    found["1x1"], plans["1x1"] = exact, AttentionPlan(((1, 1),))
    assert len(plan_quality.warnings(found, plans).splitlines()) == 3
    assert plan_quality.warnings({"exact": exact}, {"exact": plans["exact"]}) == ""


def test_the_command_for_quality(tmp_path, capsys):
    path = tmp_path / "q.json"
    plan_quality.main(
        ["--frames", "3", "--seeds", "1", "--sequences", "3", "--plans", "2x2,budget:3x3:2x2,blocks:0:0.5", "--json", str(path)]
    )
    printed = capsys.readouterr().out
    assert "| `exact` |" in printed and "| `blocks:0:0.5`, 50% of the pairs |" in printed
    found = json.loads(path.read_text())
    assert list(found["sequences"]) == ["exact", "2x2", "budget:3x3:2x2", "blocks:0:0.5"] and len(found["sequences"]["2x2"]) == 3
    assert set(found["sequences"]["2x2"][0]) == {*plan_quality.COLUMNS, *(f"layer {number}" for number in range(6))}


@pytest.mark.parametrize(
    "options",
    [["--plans", name] for name in ("nope", "2x", "0x2", "frame@9", "budget:3x3", "budget:2x2:3x3", "blocks:x:1", "")]
    + [["--frames", "1"], ["--sequences", "1"]],
)
def test_the_command_for_quality_refuses_in_words(options, capsys):
    with pytest.raises(SystemExit):
        plan_quality.main(options)
    assert capsys.readouterr().err.splitlines()[-1].startswith("python -m benchmarks.plan_quality: error: --")


def test_the_command_for_time_refuses_single_frames(capsys):
    with pytest.raises(SystemExit):
        plan_time.main(["--frames", "16,1"])
    assert "give numbers of at least 2" in capsys.readouterr().err
