"""The model around its numbers: what is computed when, precision, input errors, structure."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from page4d import PRESETS, Page4D, Page4DConfig, Prediction, preset
from page4d.config import CameraHeadConfig
from page4d.errors import ConfigError, InputError
from page4d.training.parameters import mask_schedule
from page4d_kernels import profiling, registries, use_backend

IMAGES = torch.rand(1, 2, 3, 28, 42, generator=torch.Generator().manual_seed(0))


def stages_of(model, *args, **kwargs):
    with profiling.record("cpu") as recording, torch.no_grad():
        prediction = model(*args, **kwargs)
    return prediction, list(recording.stages)


def test_only_what_is_asked_for_is_computed(model):
    prediction, stages = stages_of(model, IMAGES, outputs=["camera"], mask_strength=0)
    assert set(prediction.tensors()) == {"images", "pose_enc", "pose_enc_list"}
    assert "depth head" not in stages and "mask head" not in stages
    prediction, stages = stages_of(model, IMAGES, outputs=["mask"], mask_strength=0)
    assert set(prediction.tensors()) == {"images", "mask"}
    assert "frame 9" in stages and "frame 10" not in stages  # nothing is run past what is read
    prediction, stages = stages_of(model, IMAGES)
    wanted = ["encoder", *(f"{kind} {i}" for i in range(24) for kind in ("frame", "global"))]
    wanted[wanted.index("frame 9") + 1 : wanted.index("frame 9") + 1] = ["mask head"]
    assert stages == [*wanted, "camera head", "depth head", "point head"]
    assert set(prediction.tensors()) >= {"mask", "depth", "world_points", "pose_enc"}


def test_kept_layers_are_only_those_that_are_read(model):
    kept = []
    hook = model.aggregator.register_forward_hook(lambda module, args, out: kept.append(len(out.layers)))
    with torch.no_grad():
        model(IMAGES, outputs=["camera"])
        model(IMAGES, outputs=["depth"])
    hook.remove()
    assert kept == [1, 4]


def test_shapes_and_batch_axis(model):
    images, points = torch.rand(3, 3, 140, 154), torch.tensor([[10.0, 20.0], [100.5, 60.0]])
    with torch.no_grad():
        p = model(images, points)
    assert p.pose_enc.shape == (1, 3, 9) and p.pose_enc_list.shape == (4, 1, 3, 9)
    assert p.depth.shape == (1, 3, 140, 154, 1) and p.depth_conf.shape == (1, 3, 140, 154)
    assert p.world_points.shape == (1, 3, 140, 154, 3)
    assert p.mask.shape == (1, 3, 10, 11) and p.motion.min() > 0 and p.motion.max() < 1
    assert p.track.shape == (1, 3, 2, 2) and p.track_list.shape == (4, 1, 3, 2, 2) and p.vis.shape == p.conf.shape == (1, 3, 2)
    assert torch.allclose(p.track[:, 0], points)
    assert p.cameras.extrinsics.shape == (1, 3, 3, 4) and p.points()[0].shape == p.points("head")[0].shape


def test_mask_changes_the_cameras_through_the_special_tokens(model):
    with torch.no_grad():
        on, off = (model(IMAGES, outputs=["camera", "mask"], mask_strength=strength) for strength in (64.0, 0.0))
    assert torch.equal(on.mask, off.mask)  # the mask head reads below the first masked block
    assert (on.pose_enc - off.pose_enc).abs().max() > 1e-3


def test_gradient_reaches_the_mask_head_through_attention(model):
    model.zero_grad()
    model(IMAGES, outputs=["camera"]).pose_enc.sum().backward()
    for parameter in model.aggregator.spatial_mask_head.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    model.zero_grad()


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_trunk_keeps_the_residual_stream_and_the_heads_in_fp32(golden_weights, model, autocast):
    low = Page4D(preset("tiny")).eval()
    low.load_state_dict(golden_weights)
    if not autocast:
        low.set_compute_dtype(torch.bfloat16)
        assert low.aggregator.global_blocks[3].attn.qkv.weight.dtype == torch.bfloat16
        assert low.aggregator.global_blocks[3].norm1.weight.dtype == low.depth_head.norm.weight.dtype == torch.float32
    dtypes = {}
    low.aggregator.global_blocks[12].norm1.register_forward_pre_hook(lambda module, args: dtypes.update(residual=args[0].dtype))
    low.aggregator.register_forward_hook(lambda module, args, out: dtypes.update(kept=out.layers[0].dtype))
    low.aggregator.global_blocks[12].attn.qkv.register_forward_hook(lambda module, args, out: dtypes.update(qkv=out.dtype))
    low.depth_head.projects[0].register_forward_hook(lambda module, args, out: dtypes.update(head=out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        p = low(IMAGES)
    assert dtypes == {"residual": torch.float32, "qkv": torch.bfloat16, "kept": torch.bfloat16, "head": torch.float32}
    with torch.no_grad():
        exact = model(IMAGES)
    assert (p.depth.log() - exact.depth.log()).abs().mean() < 0.05
    assert p.mask.dtype == torch.float32 and (p.mask - exact.mask).abs().max() < 0.05


def test_no_device_synchronisation_in_a_forward(model, monkeypatch):
    monkeypatch.setattr("page4d_kernels.ops._checks.values_can_be_read", lambda x: False)  # as on a GPU

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function._schema.name
            assert name not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::lift_fresh"}, name
            return function(*args, **(kwargs or {}))

    images, points = torch.rand(2, 3, 140, 140), torch.tensor([[5.0, 5.0]])
    with torch.no_grad():
        model(images, points)  # makes the tables
        with NoSync():
            model(images, points)


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu():
    low = Page4D(preset("tiny").replace(track=None)).cuda().eval().set_compute_dtype(torch.bfloat16)
    images = torch.rand(3, 3, 140, 140, device="cuda")
    with torch.inference_mode():
        low(images)  # makes the tables, compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            low(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_a_masked_block_compiles_without_graph_break(model):
    from page4d.layers import Modulation
    from page4d.layers.attention import rope
    from page4d_kernels import TokenLayout

    layout = TokenLayout(2, 11, 5)
    x = torch.randn(1, 22, 128, requires_grad=True)
    gate = layout.only_special(torch.full((1, 22), 64.0))
    args = (x, rope((2, 3), 5, 64, 100.0, x.device, x.dtype), Modulation(gate, torch.rand(1, 22) - 0.5, layout))
    block = model.aggregator.global_blocks[12]
    expected, compiled = block(*args), torch.compile(block, fullgraph=True)(*args)
    assert torch.allclose(compiled, expected, atol=1e-4)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (compiled, expected)]
    assert torch.allclose(*gradients, atol=1e-2)


def test_refinements_are_trained_one_at_a_time(model):
    """Poses and positions are detached between iterations: the second does not reach what only the first read."""
    images, points = torch.rand(2, 3, 140, 140), torch.tensor([[70.0, 70.0]])
    prediction = model(images, points, outputs=["camera"])
    token = model.camera_head.empty_pose_tokens
    first, second = (torch.autograd.grad(p.sum(), token, retain_graph=True, allow_unused=True)[0] for p in prediction.pose_enc_list[:2])
    assert (first.abs().max() > 0 and second is None) or second.abs().max() == 0
    bias = model.track_head.tracker.updateformer.flow_head.bias
    for track in prediction.track_list[:2]:
        gradient = torch.autograd.grad(track[:, 1].sum(), bias, retain_graph=True)[0]
        assert gradient[:2].tolist() == [2.0, 2.0]  # one step of feature pixels, not the sum of all


def test_initialisation():
    torch.manual_seed(0)
    fresh = Page4D(preset("tiny"))
    assert (fresh.aggregator.global_blocks[3].ls1.gamma == 0.01).all() and (fresh.camera_head.trunk[0].ls2.gamma == 0.01).all()
    encoder = fresh.aggregator.patch_embed
    assert (encoder.blocks[0].ls1.gamma == 1).all() and not encoder.mask_token.any()
    stds = {
        fresh.aggregator.camera_token: 1e-6,
        encoder.cls_token: 1e-6,
        encoder.pos_embed: 0.02,
        encoder.blocks[1].mlp.fc1.weight: 0.02,
        fresh.track_head.tracker.updateformer.flow_head.weight: 0.001,
        fresh.track_head.tracker.updateformer.virual_tracks: 1.0,
    }
    for parameter, std in stds.items():
        assert parameter.detach().std().item() == pytest.approx(std, rel=0.15)


def test_fake_tensors_leave_no_trace(model):
    """Tables made under a fake-tensor mode are not kept for real forwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model(torch.zeros(1, 3, 42, 56)).depth.shape == (1, 1, 42, 56, 1)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 42, 56)).depth.isfinite().all()


def test_a_backend_chosen_for_the_trunk_does_not_reach_the_camera_head(model):
    calls = registries()["mask_attention"].calls
    calls.clear()
    with use_backend("chunked"), torch.no_grad():
        model(IMAGES, outputs=["camera"])
    assert calls == {"chunked": 3 + 48, "sdpa": 4 * 2}


def refuse(model, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        model(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_image_sizes(model, height, width):
    if height and width and height % 14 == 0 and width % 14 == 0:
        if height == width == 14:
            assert "at least two patches" in refuse(model, torch.zeros(1, 3, height, width))
        return
    assert "multiples of 14" in refuse(model, torch.zeros(1, 3, height, width))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=0, max_size=6).map(tuple))
def test_image_shapes(model, shape):
    refuse(model, torch.zeros(shape))


def test_input_errors(model):
    assert "no frame" in refuse(model, torch.zeros(0, 3, 28, 28))
    assert "floating point" in refuse(model, torch.zeros(1, 3, 28, 28, dtype=torch.uint8))
    assert "not one string" in refuse(model, IMAGES, outputs="depth")
    assert "unknown output 'normals'" in refuse(model, IMAGES, outputs=["normals"])
    assert "no output" in refuse(model, IMAGES, outputs=[])
    assert "at least 140 x 140" in refuse(model, IMAGES, torch.zeros(1, 2))
    assert "query_points must be" in refuse(model, IMAGES, torch.zeros(1, 0, 2))
    assert "query_points must be" in refuse(model, IMAGES, torch.zeros(2, 3))


def test_heads_that_are_not_there(golden_weights):
    config = preset("tiny").replace(track=None, depth_head=None, mask_hidden=None, mask_strength=0.0)
    bare = Page4D(config).eval()
    assert "depth" in refuse(bare, IMAGES, outputs=["depth"])
    assert "track" in refuse(bare, IMAGES, torch.zeros(1, 2))
    assert "mask" in refuse(bare, IMAGES, outputs=["mask"])
    assert "needs a mask head" in refuse(bare, IMAGES, mask_strength=64.0)
    with torch.no_grad():
        p = bare(IMAGES)
    assert p.depth is None and p.mask is None
    for missing in ("points", "motion"):
        with pytest.raises(ValueError, match="run the model with"):
            value = getattr(p, missing)
            if callable(value):
                value()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 131}, "not a multiple of num_heads"),
        ({"masked_blocks": (10, 30)}, "must be a range within the 24 blocks"),
        ({"mask_after": 12}, "too late"),
        ({"kept_layers": (4, 4, 5, 6)}, "ascending"),
        ({"kept_layers": (4, 11, 17, 24)}, "past the 24 layers"),
        ({"kept_layers": (1, 2, 3, 4)}, "no layer past 4 is run"),
        ({"mask_strength": -1.0}, "at least 0"),
        ({"masked_blocks": (10, 10)}, "has no effect"),
        ({"mask_after": -1}, "mask_after must be at least 0"),
        ({"num_heads": 0}, "num_heads must be positive"),
        ({"patch_size": 0}, "patch_size must be positive"),
        ({"image_size": 518}, r"image_size must be \(height, width\), not 518"),
        ({"depth": 24.5}, "depth must be a whole number"),
        ({"mask_strength": float("nan")}, "mask_strength must be a finite number"),
        ({"kept_layers": (4, 11, 17.5, 23)}, "kept_layers must be a whole number"),
        ({"camera": CameraHeadConfig(iterations=0)}, "camera.iterations must be positive"),
        ({"mask_hidden": None}, "needs a mask head"),
    ],
)
def test_configurations_that_contradict_themselves(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        preset("tiny").replace(**changes)
    assert "\n" not in str(error.value)


def test_presets():
    with pytest.raises(ConfigError, match=r"unknown preset 'huge': choose one of page4d, page4d-mask, vggt, nano, small, tiny"):
        preset("huge")
    for config in PRESETS.values():
        assert Page4DConfig.from_json(config.to_json()) == config
    for damaged in ("[]", "{", '{"width": 3}', '{"embed_dim": "x"}', '{"num_heads": 0}', '{"num_heads": {"a": 1}}'):
        with pytest.raises(ConfigError):
            Page4DConfig.from_json(damaged)


def test_mask_schedule():
    assert [mask_schedule(n, 6000, 10000) for n in (0, 5999, 6000, 10000, 99999)] == [64, 64, 64, 0, 0]
    assert mask_schedule(8000, 6000, 10000) == pytest.approx(32)
    assert mask_schedule(0, 0, 0) == 0


def test_prediction_round_trip(tmp_path, model):
    with torch.no_grad():
        p = model(IMAGES, outputs=["camera", "mask"])
    loaded = Prediction.load(p.save(tmp_path / "p.npz"))
    assert loaded.tensors().keys() == p.tensors().keys()
    assert all(torch.equal(value, loaded.tensors()[name]) for name, value in p.tensors().items())
    assert p.to(torch.float64).pose_enc.dtype == torch.float64
    assert p.save(tmp_path / "bare") == tmp_path / "bare" and Prediction.load(tmp_path / "bare").mask is not None
    assert p.to(torch.float64).save(tmp_path / "d.npz") and Prediction.load(tmp_path / "d.npz").pose_enc.dtype == torch.float64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "d.npz", "p.npz"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.mask = None


STAGES = {"encoder", "frame 0", "mask head", "global 23", "camera head", "depth head", "point head"}


def test_every_stage_is_an_nvtx_range_of_torch_where_the_package_is_absent(model, monkeypatch):
    pushed, depth = [], []
    monkeypatch.setenv("PAGE4D_NVTX", "1")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: (pushed.append(name), depth.append(name)))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: depth.pop())
    with torch.no_grad():
        model(IMAGES)
    assert not depth
    assert set(pushed) >= STAGES


def test_every_stage_is_an_nvtx_range_of_our_domain_with_the_category_of_its_kind(model, monkeypatch):
    nvtx = pytest.importorskip("nvtx")
    pushed, depth = {}, []

    def push(name, *, domain, category):
        assert domain == "page4d"
        pushed[name] = category
        depth.append(name)

    monkeypatch.setenv("PAGE4D_NVTX", "1")
    monkeypatch.setattr(nvtx, "push_range", push)
    monkeypatch.setattr(nvtx, "pop_range", lambda *, domain: depth.pop())
    with torch.no_grad():
        model(IMAGES)
    assert not depth and set(pushed) >= STAGES
    assert {pushed["frame 0"], pushed["global 23"], pushed["depth head"]} == {"frame", "global", "depth head"}


def test_nvtx_ranges_open_and_close_for_real(monkeypatch):
    pytest.importorskip("nvtx")
    monkeypatch.setenv("PAGE4D_NVTX", "1")
    with profiling.stage("frame 3"), profiling.stage("inner"):
        pass


@pytest.mark.slow
def test_compiled_parts_agree():
    """Pieces of two and of one frame: another number of frames compiles again, or is dynamic."""
    torch.manual_seed(0)
    eager = Page4D(preset("nano")).eval()
    compiled = copy.deepcopy(eager).compile_parts()
    images = torch.rand(3, 3, 28, 42)
    with torch.no_grad():
        for frames in (3, 2):
            found, expected = compiled(images[:frames]), eager(images[:frames])
            for name in ("depth", "depth_conf", "pose_enc", "mask"):
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
