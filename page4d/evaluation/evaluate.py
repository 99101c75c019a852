"""Evaluate a model on sequences with ground truth: the possible tasks, their metrics per sequence, and the means."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..data.preprocess import DEFAULT_SIZE
from ..data.sample import Sample
from ..errors import InputError
from ..execution.attention_plan import AttentionPlan
from ..geometry import unproject
from ..long_video.chunks import Chunking
from ..long_video.run import LongVideo
from ..model import Page4D
from ..prediction import Prediction
from .depth import ALIGNMENTS, METRICS, OFFICIAL_ALIGNMENTS, align_median, depth_metrics
from .mask import mask_metrics, moving_patches
from .points import point_metrics
from .pose import pose_metrics
from .protocol import Protocol, predict, predict_frames, predict_in_chunks, rescale_pixels, resize_depth, resize_points, video_depth
from .readers import Rules
from .tracks import track_metrics

Metrics = dict[str, dict[str, float]]  # group, such as "pose" or "depth:scale", then metric

# task -> (required ground truth, sets of model outputs of which any one suffices)
TASKS: dict[str, tuple[set[str], tuple[set[str], ...]]] = {
    "pose": (set(), ({"camera"},)),
    "depth": ({"depth"}, ({"depth"},)),
    "mono": ({"depth"}, ({"depth"},)),
    "points": ({"depth"}, ({"depth", "camera"}, {"points"})),
    "tracks": ({"tracks", "track_visible"}, ({"track"},)),
    "mask": ({"dynamic"}, ({"mask"},)),
}
DEFAULT_TASKS = frozenset(TASKS) - {"mono"}  # mono takes a forward pass per frame, so it must be named


def evaluate(
    model: Page4D,
    samples: Iterable[Sample],
    tasks: Collection[str] | None = None,
    *,
    protocol: Protocol | None = None,
    rules: Rules | None = None,
    progress: str | None = None,
) -> dict:
    """Run `model` on every sample and compare its predictions with the ground truth.

    Args:
        model: runs in eval mode. Its modes are restored afterwards.
        samples: sequences with ground truth, one at a time.
        tasks: some of "pose", "depth", "mono", "points", "tracks", "mask". None = all except mono that model and sample allow.
        protocol: how to run and compare. None = at the size that the model was trained for.
        rules: what is evaluated in this dataset. None = everything.
        progress: the title of a progress bar. None = no bar.

    Returns:
        {"sequences": [{"name", "frames", "metrics": {group: {metric: value}}, "not_finite": [output]}],
        "mean": {group: {metric: value}}, "failed": n}. A group is a task, followed by a colon and its alignment ("depth:scale") or source
        ("points:head") if it has one. With an attention plan the group "attention" has its deviation by layer, and the largest of layers
        with cells. In chunks the group "chunks" has the mean AbsRel between them, the mean scale drift and the number of loops. Means are
        over sequences; those of depth are weighted by the number of valid pixels ("pixels"). A sequence fails if an output is not finite
        or depth cannot be aligned. It then has no metrics for the tasks that need that output.

    Raises:
        InputError: a task is unknown, or the model or the data lacks what a named task needs.
    """
    protocol, rules = protocol or Protocol(model.config.image_size or DEFAULT_SIZE), rules or Rules()
    check_tasks(tasks)
    sequences = []
    with eval_mode(model):
        for sample in tqdm(samples, desc=progress, unit="sequence", disable=True if progress is None else None):
            chosen = _possible(model, sample, tasks, protocol)
            chosen = [task for task in chosen if rules.counts(task, sample.name, protocol.official)]
            metrics, broken = sequence_metrics(model, sample, chosen, protocol, rules)
            sequences.append({"name": sample.name, "frames": len(sample.images), "metrics": metrics, "not_finite": broken})
    mean = mean_metrics([sequence["metrics"] for sequence in sequences])
    return {"sequences": sequences, "mean": mean, "failed": sum(bool(sequence["not_finite"]) for sequence in sequences)}


def check_tasks(tasks: Collection[str] | None) -> None:
    """Raise InputError if a task is unknown or `tasks` is empty. None is allowed."""
    if tasks is not None and not tasks:
        raise InputError(f"no task is named: choose from {', '.join(TASKS)}")
    unknown = sorted(set(tasks or ()) - set(TASKS))
    if unknown:
        raise InputError(f"unknown task {', '.join(unknown)}: choose from {', '.join(TASKS)}")


@contextmanager
def eval_mode(model: Page4D) -> Iterator[None]:
    """Every module in eval mode. On exit each module returns to its own mode, as training may keep some of them in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _needed(task: str, official: bool) -> tuple[set[str], ...]:
    """Sets of model outputs of which any one suffices for the task."""
    if task == "depth" and official:
        return ({"depth", "camera"},)
    return TASKS[task][1]


def _possible(model: Page4D, sample: Sample, tasks: Collection[str] | None, protocol: Protocol) -> list[str]:
    """The tasks that model and sample allow, in the order of `TASKS`. InputError if a named one is not among them."""
    chosen = []
    for task, (truth, _) in TASKS.items():
        if task not in (DEFAULT_TASKS if tasks is None else tasks):
            continue
        missing = [name for name in sorted(truth) if not _has(sample, name)]
        able = any(need <= model.available for need in _needed(task, protocol.official))
        cut = task == "tracks" and _chunking(sample, protocol) is not None
        if tasks is not None and missing:
            raise InputError(f"the task {task} needs {', '.join(missing)} as ground truth, but {sample.name!r} has none: leave it out")
        if tasks is not None and not able:
            raise InputError(f"this model cannot do the task {task}: its weights have no head for it, so leave it out")
        if tasks is not None and cut:
            raise InputError("the task tracks needs one pass over all frames: leave out the task, or --chunk")
        if able and not missing and not cut:
            chosen.append(task)
    return chosen


def _chunking(sample: Sample, protocol: Protocol) -> Chunking | None:
    """The chunks of a sequence. None: one pass."""
    return protocol.chunk if protocol.chunk is not None and len(sample.images) > protocol.chunk.size else None


def _has(sample: Sample, name: str) -> bool:
    """Whether the sample has the ground truth. Tracks need a point that is visible in the first frame, where the queries are."""
    value = getattr(sample, name)
    return value is not None and (name != "track_visible" or bool(value[0].any()))


# model output -> the fields of a prediction that are compared
COMPARED = {"camera": ("pose_enc",), "depth": ("depth",), "points": ("world_points",), "track": ("track", "vis"), "mask": ("mask",)}


def _without_broken(prediction: Prediction) -> tuple[Prediction, list[str]]:
    """The prediction without the outputs that are not finite, and the names of those outputs."""
    values = {output: [getattr(prediction, field) for field in fields] for output, fields in COMPARED.items()}
    if prediction.pose_enc is not None:
        values["camera"].append(prediction.cameras.extrinsics)  # not finite for a zero quaternion, which is not a rotation
    broken = [output for output, found in values.items() if any(x is not None and not bool(x.isfinite().all()) for x in found)]
    nothing: dict[str, Any] = {field: None for output in broken for field in COMPARED[output]}
    return replace(prediction, **nothing), broken


def sequence_metrics(model: Page4D, sample: Sample, tasks: Collection[str], protocol: Protocol, rules: Rules) -> tuple[Metrics, list[str]]:
    """The metrics of one sequence, and the names of the outputs and groups that failed (see `evaluate`).

    One forward pass over all frames serves all tasks except mono, which takes one per frame.
    """
    sample = sample.to("cpu")
    found: Metrics = {}
    broken: list[str] = []
    joint = [task for task in tasks if task != "mono"]
    if joint:
        found, broken = _joint_metrics(model, sample, joint, protocol, rules)
    if "mono" in tasks:
        depth = predict_frames(model, sample, protocol)
        if depth.isfinite().all():
            found["mono:median"] = _mono(depth, sample, protocol, rules)
        else:
            broken.append("mono")
    undefined = [group for group, metrics in found.items() if metrics.get("pixels") and math.isnan(metrics["abs_rel"])]
    for group in undefined:  # for example, no scale aligns a depth of 0
        del found[group]
    return found, broken + undefined


def _joint_metrics(model: Page4D, sample: Sample, tasks: list[str], protocol: Protocol, rules: Rules) -> tuple[Metrics, list[str]]:
    """The metrics of all tasks that share one forward pass, and the outputs that are not finite."""
    queries = None
    if "tracks" in tasks and sample.tracks is not None and sample.track_visible is not None:
        queried = sample.track_visible[0]  # only points that are visible in the first frame
        queries = sample.tracks[0, queried]
        sample = replace(sample, tracks=sample.tracks[:, queried], track_visible=sample.track_visible[:, queried])
    outputs, chunk = _outputs(model, tasks, protocol.official), _chunking(sample, protocol)
    long = None if chunk is None else predict_in_chunks(model, sample, outputs, protocol, chunk)
    whole = predict(model, sample, outputs, protocol, queries) if long is None else long.prediction
    prediction, broken = _without_broken(whole)
    finite = model.available - set(broken)
    possible = [task for task in tasks if any(need <= finite for need in _needed(task, protocol.official))]
    found: Metrics = {}
    if "pose" in possible:
        found["pose"] = pose_metrics(prediction.cameras.extrinsics[0], sample.extrinsics)
    if "depth" in possible:
        found |= _video_depth(prediction, sample, protocol, rules)
    if "points" in possible:
        found |= _points(prediction, sample, protocol, rules)
    if "tracks" in possible:
        found["tracks"] = _tracks(prediction, sample)
    if "mask" in possible:
        found["mask"] = _mask(prediction, sample)
    if prediction.attention_deviation is not None and prediction.attention is not None:
        found["attention"] = _deviation(prediction.attention_deviation, AttentionPlan.from_json(prediction.attention))
    if long is not None:
        found["chunks"] = _chunks(long)
    return found, broken


def _outputs(model: Page4D, tasks: list[str], official: bool) -> set[str]:
    """The outputs to compute: those of every alternative that the model has. Tracks follow from the query points."""
    outputs: set[str] = set()
    for task in tasks:
        for need in _needed(task, official):
            if need <= model.available:
                outputs |= need
    return outputs - {"track"}


def _valid(sample: Sample, rules: Rules) -> tuple[Tensor, Tensor]:
    """The true depth (S, H, W), and whether a pixel is evaluated (S, H, W) bool."""
    assert sample.depth is not None
    counts = (sample.depth > 0) & (sample.depth < rules.max_depth)
    return sample.depth, counts if sample.valid is None else counts & sample.valid


def _compare_depth(predicted: Tensor, true: Tensor, line: tuple[float, float], protocol: Protocol, rules: Rules) -> dict[str, float]:
    """Metrics of predicted depths (N,), aligned by scale and shift `line`, against true ones (N,)."""
    aligned = predicted.double() * line[0] + line[1]
    if protocol.official:
        aligned = aligned.clamp_max(rules.official_clip)
    return {**depth_metrics(aligned, true), "pixels": float(len(true))}


def _video_depth(prediction: Prediction, sample: Sample, protocol: Protocol, rules: Rules) -> Metrics:
    true, valid = _valid(sample, rules)
    mode = "bicubic" if protocol.official else "bilinear"
    predicted = resize_depth(video_depth(prediction, protocol), (true.shape[1], true.shape[2]), mode)[valid]
    true = true[valid]
    found = {}
    for name in protocol.alignments:
        align = (OFFICIAL_ALIGNMENTS if protocol.official else ALIGNMENTS)[name]
        line = align(predicted, true) if len(true) else (1.0, 0.0)
        found[f"depth:{name}"] = _compare_depth(predicted, true, line, protocol, rules)
    return found


def _mono(depth: Tensor, sample: Sample, protocol: Protocol, rules: Rules) -> dict[str, float]:
    """Metrics with each frame aligned by its median. Means over frames are weighted by their valid pixels."""
    true, valid = _valid(sample, rules)
    predicted = resize_depth(depth, (true.shape[1], true.shape[2]), "bicubic")
    frames = []
    for p, g in ((p[v], g[v]) for p, g, v in zip(predicted, true, valid, strict=True) if v.any()):
        frames.append(_compare_depth(p, g, align_median(p, g), protocol, rules))
    if not frames:
        return {**dict.fromkeys(METRICS, math.nan), "pixels": 0.0}
    return _weighted_mean(frames)


def _points(prediction: Prediction, sample: Sample, protocol: Protocol, rules: Rules) -> Metrics:
    true, valid = _valid(sample, rules)
    points = sample.world_points
    if points is None:
        points = unproject(true.double(), sample.extrinsics, sample.intrinsics)
    found = {}
    sources = {"depth": prediction.depth is not None and prediction.pose_enc is not None, "head": prediction.world_points is not None}
    for source in (name for name, there in sources.items() if there):
        predicted = resize_points(prediction.points(source)[0][0], (true.shape[1], true.shape[2]))
        metrics = point_metrics(predicted[valid], points[valid], max_points=protocol.max_points, seed=protocol.seed)
        found[f"points:{source}"] = metrics
    return found


def _tracks(prediction: Prediction, sample: Sample) -> dict[str, float]:
    assert prediction.track is not None and prediction.vis is not None and sample.tracks is not None and sample.track_visible is not None
    size = (sample.images.shape[-2], sample.images.shape[-1])
    predicted = rescale_pixels(prediction.track[0], (prediction.images.shape[-2], prediction.images.shape[-1]), size)
    return track_metrics(predicted, prediction.vis[0] > 0.5, sample.tracks, sample.track_visible, size)


def _mask(prediction: Prediction, sample: Sample) -> dict[str, float]:
    assert sample.dynamic is not None
    motion = prediction.motion[0]
    return mask_metrics(motion, moving_patches(sample.dynamic, (motion.shape[1], motion.shape[2])))


def _deviation(layers: Tensor, plan: AttentionPlan) -> dict[str, float]:
    """The deviation from exact attention: each layer's, and the largest of the layers with cells, where it is a warning."""
    found = {f"layer {number}": float(value) for number, value in enumerate(layers)}
    cells = [value for kind, value in zip(plan.layers, found.values(), strict=True) if isinstance(kind, tuple)]
    return {"deviation": max(cells, default=math.nan), **found}


def _chunks(long: LongVideo) -> dict[str, float]:
    """Of the seams: the mean AbsRel of common depths and the mean |log scale|. And the number of loops."""
    drift = [abs(float(seam.similarity.scale.log())) for seam in long.seams]
    errors = [seam.error for seam in long.seams]
    return {"abs_rel": sum(errors) / len(errors), "scale_drift": sum(drift) / len(drift), "loops": float(len(long.loops or ()))}


def mean_metrics(sequences: list[Metrics]) -> Metrics:
    """Means over the sequences that have the group. Depth is weighted by pixels. NaN, which means "not defined", is left out."""
    groups = dict.fromkeys(group for sequence in sequences for group in sequence)
    return {group: _weighted_mean([sequence[group] for sequence in sequences if group in sequence]) for group in groups}


def _weighted_mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric, weighted by "pixels" if the rows have it; "pixels" is summed. NaN if no row has a value."""
    found = {}
    for metric in rows[0]:
        pairs = [(row.get("pixels", 1.0), row[metric]) for row in rows if not math.isnan(row[metric])]
        total = sum(weight for weight, _ in pairs)
        found[metric] = sum(weight * value for weight, value in pairs) / total if total else math.nan
    if "pixels" in found:
        found["pixels"] = sum(row["pixels"] for row in rows)
    return found
