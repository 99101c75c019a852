"""Attention plans: what they are, and what they do to a model."""

from __future__ import annotations

import json

import pytest
import torch

from page4d import Page4D, Page4DConfig, preset
from page4d.config import PlansConfig
from page4d.data.synthetic import SyntheticScenes
from page4d.errors import ConfigError, InputError
from page4d.execution import attention_plan
from page4d.execution.attention_plan import AttentionPlan, kept_share
from page4d.layers import Attention
from page4d.model.checkpoint import save_pretrained, stored_config
from page4d.prediction import Prediction
from page4d_kernels import TokenLayout


@pytest.fixture(scope="module")
def nano() -> Page4D:
    return Page4D.from_pretrained("nano").eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return SyntheticScenes("dynamic", frames=6, size=(56, 84), seed=0)[3].images


def predict(model: Page4D, images: torch.Tensor, **options) -> Prediction:
    with torch.inference_mode():
        return model(images, **options)


def test_presets():
    official, nano = preset("page4d"), preset("nano")
    assert AttentionPlan.preset("exact", official).exact
    for name, middle, late in (("balanced", (2, 2), (2, 3)), ("fast", (3, 3), (4, 4))):
        assert AttentionPlan.preset(name, official).layers == ("frame",) * 9 + (middle,) * 7 + (late,) * 8
        assert AttentionPlan.general(name, nano.depth).layers == ("frame",) * 2 + (middle,) * 2 + (late,) * 2
        assert AttentionPlan.preset(name, nano) == AttentionPlan(getattr(nano.plans, name), name)
    for name in ("turbo", "", "__class__", "replace"):
        with pytest.raises(InputError, match=f"unknown attention plan {name!r}: choose from exact, balanced, fast"):
            AttentionPlan.preset(name, nano)


def test_a_model_s_own_plans_lie_in_its_weights(nano, tmp_path):
    own = PlansConfig(balanced=("dense", "frame", (2, 3), "dense", (1, 2), (2, 2)))
    nano = Page4D(nano.config.replace(plans=own))
    read = Page4D.from_pretrained(save_pretrained(nano, tmp_path / "w.safetensors")).config
    assert read == nano.config and AttentionPlan.preset("balanced", read).layers == own.balanced
    assert AttentionPlan.preset("fast", read) == AttentionPlan.general("fast", 6), "it has none of its own"
    assert stored_config("nano").plans == preset("nano").plans != PlansConfig()
    for plans, words in (
        (PlansConfig(fast=("dense",)), "plans.fast has 1 layers instead of 6"),
        ({"fast": None}, "plans must be of type PlansConfig"),
        (None, "plans must be of type PlansConfig"),
    ):
        with pytest.raises(ConfigError, match=words):
            read.replace(plans=plans)
    for layers, words in (
        (("dense", (0, 2)), r"layer 1 of an attention plan cannot be \(0, 2\)"),
        ("dense", "plans.balanced must be a list"),
    ):
        with pytest.raises(ConfigError, match=words):
            PlansConfig(balanced=layers)
    for damaged in ("3", "[]", '{"fast": 3}', '{"fast": "frame"}', '{"fast": [["x", 2]]}', '{"slow": null}', '{"fast": [[[2]]]}'):
        text = json.dumps({**json.loads(read.to_json()), "plans": json.loads(damaged)})
        with pytest.raises(ConfigError):
            Page4DConfig.from_json(text)


def test_what_a_caller_may_give(tmp_path):
    config, cells = preset("nano"), AttentionPlan(((2, 2),) * 6)
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xef\xbb\xbf" + AttentionPlan(cells.layers, "a\nb\x1b[31m").to_json().encode())  # as Windows editors begin a file
    for given in (cells, cells.layers, [[2, 2]] * 6, "2x2", path, str(path)):
        assert AttentionPlan.of(given, config).layers == cells.layers
    assert AttentionPlan.of(path, config).name == "a b" and AttentionPlan.of("2x2", config).name == "2x2"
    assert AttentionPlan.of(None, config) == AttentionPlan.of("exact", config) == AttentionPlan.preset("exact", config)
    path.write_text('{"layer": []}')
    with pytest.raises(InputError, match=r"mine\.json': an attention plan needs 'layers'"):
        AttentionPlan.of(path, config)


def test_json():
    plan = AttentionPlan(("dense", "frame", (2, 3)), "mine")
    assert AttentionPlan.from_json(plan.to_json()) == plan and json.loads(plan.to_json())["layers"] == ["dense", "frame", [2, 3]]
    for text in ("", "[]", "{}", '{"layers": 3}', '{"layers": []}', '{"layers": ["sparse"]}', '{"layers": [[2]]}', '{"layers": [[0, 2]]}',
                 '{"layers": [[2.0, 2]]}', '{"layers": [[true, 2]]}', '{"layers": [null]}', "[" * 100_000):  # fmt: skip
        with pytest.raises(InputError) as error:
            AttentionPlan.from_json(text)
        assert "\n" not in str(error.value)


def test_an_exact_plan_changes_no_bit(nano, images):
    exact = predict(nano, images)
    for plan in (AttentionPlan.preset("exact", nano.config), AttentionPlan(((1, 1),) * 6)):
        assert predict(nano, images, attention=plan) == exact
    assert exact.attention_deviation is None


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_plans_are_near_and_repeat(nano, images, name):
    exact, plan = predict(nano, images), AttentionPlan.preset(name, nano.config)
    found = predict(nano, images, attention=plan)
    assert found == predict(nano, images, attention=plan) and found != exact
    assert 0 < ((found.depth - exact.depth) / exact.depth).abs().mean() < 0.2
    assert (found.attention_deviation > 0).all() and found.attention_deviation.shape == (6,)


def test_a_list_of_layers_serves_too(nano, images):
    layers = ["frame", "dense", (2, 2), (2, 2), (2, 2), "dense"]
    assert predict(nano, images, attention=AttentionPlan(layers)) == predict(nano, images, attention=AttentionPlan(tuple(layers)))


def test_a_single_frame_is_exact(nano, images):
    plan = AttentionPlan(("frame", (2, 2), (3, 3)) * 2)
    exact, found = predict(nano, images[:1]), predict(nano, images[:1], attention=plan)
    assert torch.equal(found.depth, exact.depth) and found.attention_deviation is None


def test_the_runners_agree(nano, images):
    """With gradients the eager runner runs, without them the streamed one, in chunks of one frame too."""
    plan = AttentionPlan(("dense", "frame", (2, 2), (1, 2), (3, 3), (2, 2)))
    streamed = predict(nano, images, attention=plan)
    small = predict(nano, images, attention=plan, memory_budget=0)
    eager = nano(images, attention=plan)
    for name in ("pose_enc", "depth", "mask"):
        assert torch.allclose(getattr(streamed, name), getattr(eager, name), atol=1e-4)
        assert torch.allclose(getattr(streamed, name), getattr(small, name), atol=1e-4)
    assert eager.attention_deviation is None
    eager.depth.mean().backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in nano.aggregator.global_blocks)
    nano.zero_grad()


def test_the_deviation_is_that_of_the_rows(nano, images, monkeypatch):
    """Checked on all patch rows of one layer, against dense attention with the same inputs."""
    plan = AttentionPlan(("dense",) * 4 + ((2, 2), "frame"))
    seen: list[tuple] = []
    attend = Attention.attend

    def recorded(self, q, k, v, modulation=None, sparsity=None):
        out, measured = attend(self, q, k, v, modulation, sparsity)
        if sparsity is not None:
            dense, _ = attend(self, q, k, v)
            patches = (torch.arange(q.shape[2]) % sparsity.layout.tokens_per_frame) >= sparsity.layout.special_tokens
            difference = (out - dense)[:, :, patches].norm() / dense[:, :, patches].norm()
            seen.append((difference, len(sparsity.checked), sparsity.checked))
        return out, measured

    monkeypatch.setattr(Attention, "attend", recorded)
    found = predict(nano, images, attention=plan, attention_check=10**6)
    assert found.attention_deviation[:4].tolist() == [0] * 4
    for layer, (difference, count, rows) in zip((4, 5), seen, strict=True):
        assert found.attention_deviation[layer] == pytest.approx(float(difference), rel=1e-5)
        assert count == 6 * 96 == len(rows.unique())
    seen.clear()
    some = predict(nano, images, attention=plan)
    assert seen[0][1] == attention_plan.CHECKED_ROWS == 64
    assert torch.allclose(some.attention_deviation, found.attention_deviation, rtol=0.3)
    assert predict(nano, images, attention=plan, attention_check=0).attention_deviation is None


def test_a_prediction_keeps_its_plan_and_deviation(nano, images, tmp_path):
    plan = AttentionPlan.preset("fast", nano.config)
    found = predict(nano, images, attention=plan)
    loaded = Prediction.load(found.save(tmp_path / "p.npz"))
    assert loaded == found and torch.equal(loaded.attention_deviation, found.attention_deviation)
    assert AttentionPlan.from_json(loaded.attention) == plan == AttentionPlan.from_json(found.to("cpu").attention)
    exact = predict(nano, images)
    assert exact.attention is None and "attention" not in exact.tensors() and exact == Prediction.load(exact.save(tmp_path / "e.npz"))
    assert found.frame(2).depth.shape[1] == 1 and found.frame(2).attention_deviation.shape == (6,)


def test_mistakes(nano, images):
    with pytest.raises(InputError, match="the attention plan has 3 layers, and the model 6"):
        predict(nano, images, attention=AttentionPlan(("frame",) * 3))
    for check in (-1, 1.5, True):
        with pytest.raises(InputError, match="attention_check must be"):
            predict(nano, images, attention_check=check)
    for plan, words in (
        ("turbo", "unknown attention plan 'turbo'"),
        (3, "is a list of layers"),
        ([], "at least one"),
        ("0x2", r"layer 0 .* \(0, 2\)"),
    ):
        with pytest.raises(InputError, match=words):
            predict(nano, images, attention=plan)
    with pytest.raises(InputError, match="cannot have the name 'exact'"):
        AttentionPlan(((2, 2),), "exact")
    with pytest.raises(InputError, match="layer 1 of an attention plan cannot be"):
        AttentionPlan(("dense", (2, 0)))


def test_the_memory_plan_counts_the_kept_keys(nano):
    shape = (1, 40, 3, 56, 84)
    dense, sparse = (nano.plan(shape, ["camera"], attention=plan).bytes for plan in (None, AttentionPlan(((2, 2),) * 6)))
    row = 40 * 101 * 128 * 4
    kept = (40 * 5 + 96 + 39 * 24) / (40 * 101)
    assert sparse - dense in (0, round(2 * kept * row)), "nothing, where another moment of the pass needs more"
    assert kept_share(AttentionPlan(((2, 2),) * 6), nano.config, 40, (56, 84)) == pytest.approx(kept)
    assert kept_share(AttentionPlan(("frame",) * 6), nano.config, 40, (56, 84)) == 0


@pytest.mark.parametrize("kind", ["frame", (2, 2)])
def test_a_sparse_layer_keeps_the_mask(kind):
    """In its special rows, and in them alone."""
    layout = TokenLayout(3, 5 + 8 * 12, 5)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.tokens, 16, generator=generator) for _ in range(3))
    gate = layout.only_special(torch.full((1, layout.tokens), 8.0))
    bias = torch.rand(1, layout.tokens, generator=generator)
    sparse = AttentionPlan((kind,)).sparsity(0, layout, (8, 12), 0, torch.device("cpu"))
    masked, plain = (sparse.attend(q, k, v, *vectors, None)[0] for vectors in ((gate, bias), (None, None)))
    changed = (masked - plain).abs().amax((0, 1, 3)) > 1e-4
    assert torch.equal(changed, torch.arange(layout.tokens) % 101 < 5)


def test_with_gradients_nothing_is_checked(nano, images, monkeypatch):
    counts = []
    original = AttentionPlan.sparsity
    monkeypatch.setattr(AttentionPlan, "sparsity", lambda *a: counts.append(a[4]) or original(*a))
    nano(images, attention="fast")
    assert set(counts) == {0}


def test_another_depth_has_no_plans_of_its_own():
    assert preset("nano").replace(depth=8, kept_layers=(1, 2, 4, 7)).plans == PlansConfig()
    own = PlansConfig(fast=("dense",) * 8)
    assert preset("nano").replace(depth=8, kept_layers=(1, 2, 4, 7), plans=own).plans == own


def test_every_layer_keeps_other_patches():
    plan, layout = AttentionPlan(((2, 2),) * 5), TokenLayout(3, 5 + 8 * 12, 5)
    kept = [plan.sparsity(layer, layout, (8, 12), 0, torch.device("cpu")).keys.kept for layer in range(5)]
    assert all(not torch.equal(kept[0], other) for other in kept[1:4]) and torch.equal(kept[0], kept[4])
