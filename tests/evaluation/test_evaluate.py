from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from page4d import Page4D, preset
from page4d.data.synthetic import SyntheticScenes
from page4d.errors import InputError
from page4d.evaluation import TASKS, Protocol, Rules, evaluate
from page4d.evaluation.protocol import network_images, network_size, resize_depth
from page4d.evaluation.report import table
from page4d.execution.attention_plan import AttentionPlan
from page4d.long_video.chunks import Chunking


@pytest.mark.parametrize("size", [56, 112, (42, 84)])
def test_a_model_that_knows_the_truth_scores_perfectly(scene, oracle, size):
    sample = scene()
    model = oracle([sample])
    result = evaluate(model, [sample], TASKS, protocol=Protocol(size, False, ("scale", "scale&shift", "median", "metric"), max_points=5000))
    metrics = result["mean"]
    assert set(metrics) == {
        "pose", "depth:scale", "depth:scale&shift", "depth:median", "depth:metric", "points:depth", "points:head", "tracks", "mask",
        "mono:median",
    }  # fmt: skip
    assert max(metrics["pose"][name] for name in ("ate", "rpe_trans")) < 1e-4 and metrics["pose"]["rpe_rot"] < 0.1
    for group in ("depth:scale", "depth:median", "mono:median"):
        assert metrics[group]["delta1"] > 0.85 and metrics[group]["abs_rel"] < (1e-5 if size == 56 else 0.1), group
        assert metrics[group]["pixels"] == sample.valid.sum()
    if size == 56:
        assert metrics["depth:metric"]["abs_rel"] == pytest.approx(0.6, abs=1e-4)  # the oracle's unit is 0.4
        assert max(*metrics["points:depth"].values(), *metrics["points:head"].values()) < 1e-3
    assert metrics["tracks"] == pytest.approx({"delta_avg": 1, "occlusion_accuracy": 1, "average_jaccard": 1})
    assert metrics["mask"]["auc"] == metrics["mask"]["best_iou"] == 1


def test_one_pass_serves_all_tasks_except_mono(scene, oracle):
    sample = scene(frames=3)
    model = oracle([sample]).train()
    model.dropout.eval()  # training keeps some parts in eval mode
    evaluate(model, [sample], ["mono", "pose"], protocol=Protocol(size=56, mask_strength=3.0))
    assert [call["frames"] for call in model.calls] == [3, 1, 1, 1]
    assert [call["outputs"] for call in model.calls] == [{"camera"}] + [{"depth"}] * 3
    assert all(call["strength"] == 3.0 and not call["training"] for call in model.calls)
    assert model.training and not model.dropout.training
    model.calls.clear()
    result = evaluate(model, [sample])
    assert "mono:median" not in result["mean"] and len(model.calls) == 1


def test_impossible_tasks_are_left_out_or_refused(scene, oracle):
    sample = scene()
    bare = replace(sample, depth=None, dynamic=None, tracks=None)
    assert set(evaluate(oracle([bare]), [bare])["mean"]) == {"pose"}
    unseen = replace(sample, track_visible=torch.zeros_like(sample.track_visible))
    assert "tracks" not in evaluate(oracle([unseen]), [unseen])["mean"]
    poor = oracle([sample], available={"depth"})
    assert set(evaluate(poor, [sample])["mean"]) == {"depth:scale"}
    assert evaluate(poor, [sample], protocol=Protocol(official=True))["mean"] == {}  # its depth needs cameras
    with pytest.raises(InputError, match="the task mask needs dynamic as ground truth, but 'scene-0' has none"):
        evaluate(oracle([bare]), [bare], ["mask"])
    with pytest.raises(InputError, match="this model cannot do the task pose"):
        evaluate(poor, [sample], ["pose"])
    with pytest.raises(InputError, match="unknown task colour: choose from pose"):
        evaluate(poor, [sample], ["colour"])
    with pytest.raises(InputError, match="no task is named: choose from pose"):
        evaluate(poor, [sample], [])


def test_true_points_come_from_true_depth_if_missing(scene, oracle):
    sample = scene()
    bare = replace(sample, world_points=None)
    model = oracle([sample], available={"camera", "depth"})
    found = evaluate(model, [bare], ["points"], protocol=Protocol(size=56))["mean"]
    assert max(found["points:depth"].values()) < 1e-3


def test_rules_limit_tasks_and_depth(scene, oracle):
    sample = scene()
    rules = Rules(pose_sequences=frozenset({"another"}), max_depth=4.0)
    found = evaluate(oracle([sample]), [sample], ["pose", "depth"], protocol=Protocol(size=56), rules=rules)["mean"]
    assert set(found) == {"depth:scale"}
    assert found["depth:scale"]["pixels"] == (sample.valid & (sample.depth < 4)).sum()


def test_means_of_depth_are_weighted_by_pixels(scene, oracle):
    samples = [scene(seed=0), scene(seed=1)]
    samples[1] = replace(samples[1], valid=samples[1].valid & (torch.arange(56) < 10))
    model = oracle(samples)
    model.samples = [replace(samples[0], depth=samples[0].depth * (1 + 0.5 * samples[0].dynamic))]  # wrong in both
    result = evaluate(model, samples, ["depth", "mono", "pose"], protocol=Protocol(size=56))
    rows = [sequence["metrics"] for sequence in result["sequences"]]
    for group in ("depth:scale", "mono:median"):
        pixels = [row[group]["pixels"] for row in rows]
        assert pixels == [float(sample.valid.sum()) for sample in samples]
        for name in ("abs_rel", "rmse", "delta1"):
            weighted = sum(n * row[group][name] for n, row in zip(pixels, rows, strict=True)) / sum(pixels)
            assert result["mean"][group][name] == pytest.approx(weighted)
        assert result["mean"][group]["pixels"] == sum(pixels)
    assert result["mean"]["pose"]["ate"] == pytest.approx((rows[0]["pose"]["ate"] + rows[1]["pose"]["ate"]) / 2)


def test_frames_without_valid_pixels_do_not_count(scene, oracle):
    sample = scene()
    valid = sample.valid.clone()
    valid[1] = False
    some, none = replace(sample, valid=valid), replace(sample, valid=torch.zeros_like(valid))
    found = evaluate(oracle([some]), [some], ["mono"], protocol=Protocol(size=56))["mean"]["mono:median"]
    assert found["abs_rel"] < 1e-5 and found["pixels"] == valid.sum()
    empty = evaluate(oracle([none]), [none], ["mono", "depth", "points"], protocol=Protocol(size=56))["mean"]
    assert all(math.isnan(empty[group]["abs_rel"]) and empty[group]["pixels"] == 0 for group in ("mono:median", "depth:scale"))
    mixed = evaluate(oracle([sample]), [sample, none], ["depth"], protocol=Protocol(size=56))["mean"]
    assert mixed["depth:scale"]["abs_rel"] < 1e-5


@pytest.mark.parametrize(
    ("size", "original", "expected"),
    [(518, (436, 1024), (224, 518)), (518, (480, 640), (392, 518)), (518, (640, 480), (518, 392)), ((140, 518), (480, 640), (140, 182)),
     (28, (10, 1000), (14, 28))],
)  # fmt: skip
def test_the_aspect_ratio_is_kept_unless_official(size, original, expected):
    assert network_size(original, Protocol(size=size)) == expected
    box = (size, size) if isinstance(size, int) else size
    assert network_size(original, Protocol(size=size, official=True)) == box


def test_images_are_antialiased_unless_official():
    stripes = (torch.arange(560) % 2).float().expand(1, 3, 280, 560)  # the finest stripes average to grey
    ours = network_images(stripes, Protocol(size=56))
    assert ours.shape[-2:] == (28, 56) and (ours - 0.5).abs().max() < 0.1
    noise = torch.rand(1, 3, 280, 560, generator=torch.Generator().manual_seed(0))
    official = network_images(noise, Protocol(size=56, official=True))
    assert official.shape[-2:] == (56, 56)
    by_hand = torch.nn.functional.interpolate(noise, size=(28, 56), mode="bicubic", antialias=True).clamp(0, 1)
    by_hand = (by_hand * 255).round() / 255
    rows = torch.arange(56)
    position = ((rows + 0.5) / 2 - 0.5).clamp(0, 27)  # bilinear between rows, centres aligned
    low, weight = position.floor().long(), (position % 1)[:, None]
    high = (low + 1).clamp_max(27)
    assert torch.allclose(official, by_hand[..., low, :] * (1 - weight) + by_hand[..., high, :] * weight, atol=1e-6)


def test_the_official_size_is_seen_by_the_model(scene, oracle):
    sample = scene()
    for official, size in ((False, (42, 56)), (True, (56, 56))):
        model = oracle([sample])
        evaluate(model, [sample], ["pose"], protocol=Protocol(size=56, official=official))
        assert model.calls[0]["size"] == size


def test_official_video_depth_is_the_height_in_the_world(scene, oracle):
    sample = scene(size=(56, 56))
    found = {}
    for official in (False, True):
        found[official] = evaluate(oracle([sample]), [sample], ["depth", "mono"], protocol=Protocol(size=56, official=official))["mean"]
    assert found[False]["depth:scale"]["abs_rel"] < 1e-5
    assert found[True]["depth:scale"]["abs_rel"] > 0.01  # the cameras turn and move
    assert found[True]["mono:median"]["abs_rel"] < 0.02  # single frames are not affected
    still = replace(sample, extrinsics=torch.eye(4)[:3].expand(3, 3, 4))
    result = evaluate(oracle([still]), [still], ["depth"], protocol=Protocol(size=56, official=True))["mean"]
    assert result["depth:scale"]["abs_rel"] < 0.02  # in the first camera's frame, the two are one


def test_official_clip_skip_and_alignment(scene, oracle):
    sample = replace(scene(size=(56, 56)), extrinsics=torch.eye(4)[:3].expand(3, 3, 4))
    clipped = Rules(official_clip=3.0)
    for official in (False, True):
        for task in ("depth", "mono"):
            protocol = Protocol(size=56, official=official)
            found = evaluate(oracle([sample]), [sample], [task], protocol=protocol, rules=clipped)["mean"]
            error = next(iter(found.values()))["rmse"]
            assert (error > 0.5) == official
    skipped = Rules(official_skip=frozenset({sample.name}))
    assert evaluate(oracle([sample]), [sample], ["depth"], protocol=Protocol(size=56, official=True), rules=skipped)["mean"] == {}
    assert evaluate(oracle([sample]), [sample], ["depth"], protocol=Protocol(size=56), rules=skipped)["mean"]
    shifted = oracle([replace(sample, depth=(sample.depth + 3) * sample.valid)])
    errors = []
    for official in (False, True):
        protocol = Protocol(size=56, official=official, alignments=("scale&shift",))
        errors.append(evaluate(shifted, [sample], ["depth"], protocol=protocol)["mean"]["depth:scale&shift"]["abs_rel"])
    assert errors[0] < 1e-4 < 0.02 < errors[1]  # a thousand steps of 1e-4 do not reach it


def test_bilinear_depth_stays_in_range_and_bicubic_overshoots():
    ramp = torch.arange(8.0).expand(1, 4, 8).clone()
    assert torch.equal(resize_depth(ramp, (4, 8), "bicubic"), ramp)
    ramp[..., 4:] += 100  # an edge
    smooth, sharp = (resize_depth(ramp, (4, 32), mode) for mode in ("bilinear", "bicubic"))
    assert smooth.min() >= 0 and smooth.max() <= 107 and (sharp.min() < 0 or sharp.max() > 107)


def test_a_protocol_with_mistakes_is_refused():
    with pytest.raises(InputError, match="multiples of 14, for example 56"):
        Protocol(size=50)
    with pytest.raises(InputError, match="unknown alignment best: choose from scale"):
        Protocol(alignments=("best",))


def test_predictions_that_are_not_finite_are_counted_and_left_out(scene, oracle):
    """The tasks that need them have no metrics. The other tasks of the sequence do."""
    sample = scene(size=(56, 56))

    class Broken(oracle):
        broken: tuple[str, ...] = ()

        def forward(self, images, *args, **options):
            found = super().forward(images, *args, **options)
            for field in self.broken:
                if getattr(found, field) is not None:
                    getattr(found, field).view(-1)[3] = math.nan
            return found

    model, protocol = Broken([sample]), Protocol(size=56, max_points=500)
    tasks = ["pose", "depth", "mono", "points", "mask"]
    assert evaluate(model, [sample], tasks, protocol=protocol)["failed"] == 0
    for broken, names, left in (
        ("pose_enc", ["camera"], {"depth:scale", "points:head", "mask", "mono:median"}),
        ("depth", ["depth", "mono"], {"pose", "points:head", "mask"}),
        ("world_points", ["points"], {"pose", "depth:scale", "points:depth", "mask", "mono:median"}),
        ("mask", ["mask"], {"pose", "depth:scale", "points:depth", "points:head", "mono:median"}),
    ):
        model.broken = (broken,)
        result = evaluate(model, [sample, sample], tasks, protocol=protocol)
        assert result["failed"] == 2 and result["sequences"][0]["not_finite"] == names and set(result["mean"]) == left
        assert "**2 of 2 sequences of it failed**" in table({"it": result})
    model.broken = ("pose_enc",)
    assert "depth:scale" not in evaluate(model, [sample], ["depth"], protocol=replace(protocol, official=True))["mean"]
    model.broken = ("depth",)
    assert "failed" in table({"it": evaluate(model, [sample], ["depth"], protocol=protocol)}).splitlines()[-1]
    model.available, model.broken = {"camera"}, ("pose_enc",)
    assert evaluate(model, [sample])["mean"] == {}


def test_finite_predictions_that_cannot_be_compared_are_failures(scene, oracle):
    """A camera with a zero quaternion, and depth that no scale aligns."""
    sample = scene(size=(56, 56))

    class Degenerate(oracle):
        def forward(self, images, *args, **options):
            found = super().forward(images, *args, **options)
            if found.pose_enc is not None:
                found.pose_enc[0, 1, 3:7] = 0
            return found if found.depth is None else replace(found, depth=torch.zeros_like(found.depth))

    protocol = Protocol(size=56, alignments=("median",))
    result = evaluate(Degenerate([sample]), [sample], ["pose", "depth", "mono", "points"], protocol=protocol)
    assert result["sequences"][0]["not_finite"] == ["camera", "depth:median", "mono:median"] and set(result["mean"]) == {"points:head"}


def test_a_random_model_has_finite_metrics(scene):
    torch.manual_seed(0)
    model = Page4D(preset("tiny")).eval()
    sample = scene(frames=2, size=(140, 140))
    found = evaluate(model, [sample], TASKS, protocol=Protocol(size=140, max_points=1000))["mean"]
    assert {group.partition(":")[0] for group in found} == set(TASKS)
    assert all(math.isfinite(value) for metrics in found.values() for value in metrics.values())


def test_the_deviation_of_a_plan_is_reported():
    model = Page4D.from_pretrained("nano", device="cpu")
    scenes = SyntheticScenes("dynamic", frames=3, size=(56, 84), seed=0, length=2)
    plan = AttentionPlan(("dense",) * 4 + ((3, 3), "dense"))
    found = evaluate(model, scenes, ["pose"], protocol=Protocol((56, 84), attention=plan))
    values = found["mean"]["attention"]
    assert list(values) == ["deviation", *(f"layer {number}" for number in range(6))]
    assert values["layer 0"] == 0 < values["layer 4"] == values["deviation"]
    assert "attention deviation" in table({"scenes": found})
    exact = evaluate(model, scenes, ["pose"], protocol=Protocol((56, 84)))
    assert "attention" not in exact["mean"] and exact["mean"]["pose"] != found["mean"]["pose"]


def test_in_chunks_the_seams_are_reported_and_points_are_not_tracked():
    samples = SyntheticScenes("walk", frames=20, size=(56, 84), seed=1, length=2, moving=1, tracks=8)
    model = Page4D.from_pretrained("nano", device="cpu")
    protocol = Protocol((56, 84), chunk=Chunking(8, 2))
    found = evaluate(model, samples, protocol=protocol)
    whole = evaluate(model, samples, protocol=Protocol((56, 84)))
    assert set(found["mean"]) == set(whole["mean"]) | {"chunks"} and "tracks" not in found["mean"]
    assert 0 < found["mean"]["chunks"]["abs_rel"] < 1 and found["mean"]["chunks"]["scale_drift"] > 0
    assert found["mean"]["pose"] != whole["mean"]["pose"] and "chunks AbsRel" in table({"walk": found})
    longer = replace(protocol, chunk=Chunking(20, 2))
    assert evaluate(model, samples, protocol=longer)["mean"] == whole["mean"], "what fits into one chunk is one pass"
    tracker = Page4D(preset("tiny"))
    with pytest.raises(InputError, match="tracks needs one pass over all frames"):
        evaluate(tracker, samples, ["tracks"], protocol=replace(protocol, size=(28, 42)))
    assert "tracks" not in evaluate(tracker, samples, protocol=replace(protocol, size=(28, 42)))["mean"]
