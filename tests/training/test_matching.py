"""Training from scratch: supervision of correspondence, and the initial weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from page4d.config import preset
from page4d.data.synthetic import SyntheticScenes
from page4d.errors import ConfigError
from page4d.layers.attention import rope
from page4d.model import Page4D
from page4d.model.checkpoint import save_pretrained
from page4d.training import Trainer, load_config
from page4d.training.init_from_scratch import start_from_scratch
from page4d.training.matching import Matching
from page4d.training.targets import collate, normalise
from page4d_kernels import qk_norm_rope

QUICK = ["data.size=[28, 42]", "data.frames=[2, 3]", "data.images=4", "trainable=all", "mask.strength=0", "loss.match=1", "steps=4"]


@pytest.fixture(scope="module")
def batch():
    scenes = SyntheticScenes("static", frames=3, size=(28, 42), seed=5, tracks=12)
    return normalise(collate([scenes[0], scenes[1]]))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Page4D(preset("nano"))
    start_from_scratch(model)
    return model


def test_the_loss_is_that_of_loops(model, batch):
    matching = Matching(model)
    seen = {}
    for index in (1, 2):
        model.aggregator.global_blocks[index].norm1.register_forward_hook(lambda m, i, o, index=index: seen.__setitem__(index, o))
    model.aggregator.register_forward_hook(lambda m, i, o: seen.__setitem__("last", o.layers[-1].flatten(-2)))
    model(batch.images, outputs=["camera"], mask_strength=0.0)
    found = matching(batch)

    per_frame, columns = 5 + 4 * 6, 6
    tokens_at = lambda x, y: 5 + int((y + 0.5) // 7) * columns + int((x + 0.5) // 7)  # noqa: E731
    entropies, errors = [], []
    table = rope((4, 6), 5, 64, 100.0, torch.device("cpu"), torch.float32)
    for index in (1, 2):
        attention = model.aggregator.global_blocks[index].attn
        parts = attention.qkv(seen[index]).unflatten(-1, (3, 2, 64))
        norms = (attention.q_norm.weight, attention.q_norm.bias, attention.k_norm.weight, attention.k_norm.bias)
        q, k, _ = qk_norm_rope(parts, *norms, table.cos, table.sin, grid=(4, 6), special_tokens=5, backend="reference")
        attended = (q[:, 0] @ k[:, 0].transpose(1, 2) / 8).log_softmax(-1)
        for b in range(2):
            for s in (1, 2):
                for n in range(12):
                    if not (batch.track_visible[b, 0, n] and batch.track_visible[b, s, n]):
                        continue
                    here, there = batch.tracks[b, s, n], batch.tracks[b, 0, n]
                    query = s * per_frame + tokens_at(*here)
                    entropies.append(-attended[b, query, tokens_at(*there)])
                    predicted = matching.displacement(matching.norm(seen["last"][b, s, tokens_at(*here)]))
                    errors.append((predicted - (there - here) / 7).abs().mean())
    assert len(entropies) > 20
    torch.testing.assert_close(found, torch.stack(entropies).mean() + torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_the_loss_is_zero_without_a_visible_point(model, batch):
    matching = Matching(model)
    model(batch.images, outputs=["camera"], mask_strength=0.0)
    loss = matching(replace(batch, track_visible=torch.zeros_like(batch.track_visible)))
    loss.backward()
    assert loss == 0


def test_attention_learns_where_to_look(model, batch):
    matching = Matching(model)
    optimizer = torch.optim.AdamW([*model.parameters(), *matching.parameters()], lr=1e-3)
    losses = []
    for _ in range(15):
        model(batch.images, outputs=["camera"], mask_strength=0.0)
        losses.append(matching(batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_a_run_resumes_exactly_and_leaves_nothing_in_the_weights(tmp_path):
    def run(name, **options):
        return Trainer(load_config(None, [*QUICK, f"out={tmp_path / name}"]), device="cpu", **options)

    straight = run("straight")
    values = straight.train()
    assert values["match"] > 0 and values["loss"] == pytest.approx(5 * values["camera"] + values["depth"] + values["match"], rel=1e-4)
    run("halves").train(max_step=2)
    second = run("halves", resume=True)
    second.train()
    for (name, a), b in zip(straight.objective.state_dict().items(), second.objective.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert any(name.startswith("matching.displacement") for name in straight.objective.state_dict())
    assert set(Page4D.from_pretrained(tmp_path / "halves" / "model.safetensors", device="cpu").state_dict()) == set(
        Page4D(preset("nano")).state_dict()
    )


def test_a_match_loss_alone_is_an_error():
    with pytest.raises(ConfigError, match=r"^loss: the weights of camera, depth, points, track, mask are all 0: set one of them$"):
        load_config(None, ["loss.match=1", "loss.camera=0", "loss.depth=0"])


def test_a_run_starts_from_distinct_embeddings_or_from_the_given_weights(tmp_path):
    """From scratch: positions and first-frame tokens differ, and q equals k. From weights: those weights."""
    fresh = Trainer(load_config(None, [*QUICK, f"out={tmp_path / 'fresh'}"]), device="cpu").model.aggregator
    positions = fresh.patch_embed.pos_embed[0, 1:]
    distance = torch.cdist(positions, positions) + 10 * torch.eye(len(positions))
    assert distance.min() > 0.3  # between any two positions
    assert (fresh.camera_token[:, 0] - fresh.camera_token[:, 1]).norm() > 1
    for block in fresh.global_blocks:
        q, k, v = block.attn.qkv.weight.chunk(3)
        assert torch.equal(q, k) and not torch.equal(k, v)
    other = Page4D(preset("nano"))
    save_pretrained(other, tmp_path / "weights.safetensors")
    begun = Trainer(load_config(None, [*QUICK, f"out={tmp_path / 'begun'}", f"weights={tmp_path / 'weights.safetensors'}"]), device="cpu")
    assert torch.equal(begun.model.aggregator.camera_token, other.aggregator.camera_token)
