"""From frames to predictions and files: the steps of `page4d infer`."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from page4d_kernels import env, mask_attention, registries, use_backend
from page4d_kernels.profiling import Recording, peak_bytes, record, stage
from page4d_kernels.qualify.__main__ import first_run
from page4d_kernels.qualify.record import mode as qualification_mode

from ..config import Layer
from ..data import Frames
from ..data.preprocess import Size
from ..errors import InputError
from ..execution.attention_plan import CHECKED_ROWS, AttentionPlan, check_rows
from ..execution.memory import MemoryPlan, budget_of
from ..execution.ranks import EXCHANGE, Ranks
from ..export import DEFAULT, FOLDERS, FORMATS, ExportOptions, check_formats, expanded, export, export_chunks
from ..files import Allocate, AtomicFiles, check_writable, on_disk
from ..long_video.chunks import Chunking
from ..long_video.join import moved
from ..long_video.known import anchor, read_cameras
from ..long_video.passes import Passes, check_outputs, needed, predict_in_chunks, with_intrinsics
from ..long_video.report import as_json
from ..long_video.run import LongVideo
from ..long_video.store import Store, sweep
from ..model import OUTPUTS, Page4D, default_dtype
from ..model.opening import DEFAULT_WEIGHTS, check_weights, open_device, open_model
from ..prediction import Cameras, Prediction
from . import chunked
from .inputs import DEFAULT_FRAMES, count, query_tensor, read_inputs
from .parallel import Leader

FIELDS = {"camera": {"pose_enc"}, "depth": {"depth", "depth_conf"}, "points": {"world_points"}, "mask": {"mask"}}  # by output


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` found, and what it cost."""

    prediction: Prediction  # of one sequence (B = 1), on the CPU
    frames: Frames
    files: list[Path]  # that were written
    device: torch.device
    seconds: float  # of the forward pass
    recording: Recording  # seconds and peak memory per stage
    attention: Counter[str]  # calls of `mask_attention` by backend
    mask_strength: float
    plan: AttentionPlan  # what the patches of each global layer saw
    long_video: LongVideo | None = None  # chunks, seams and loops, if it was not one pass
    known: dict[str, float] | None = None  # how far the prediction was from known cameras, in their unit, see `pose_metrics`

    @property
    def cameras(self) -> Cameras:
        """OpenCV cameras (1, S, ...) in pixels of the original pictures, where `Prediction.cameras` has those that the network saw."""
        found = self.prediction.cameras
        return Cameras(found.extrinsics, self.frames.intrinsics_in_original(found.intrinsics[0])[None])


def reconstruct(
    inputs: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    weights: str = DEFAULT_WEIGHTS,
    *,
    formats: Sequence[str] | None = None,
    moving: float = 0.5,
    glb: str = "animated",
    depth_size: str = "network",
    depth_type: str = "png",
    frames: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    size: Size | None = None,
    fit: str = "crop",
    value_range: str = "auto",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    attn: str | None = None,
    mask_strength: float | None = None,
    attention: AttentionPlan | str | Path | Sequence[Layer] | None = None,
    attention_check: int = CHECKED_ROWS,
    query_points: Sequence[tuple[float, float]] | None = None,
    track_grid: int | None = None,
    chunk: Chunking | int | Sequence[int] | str | None = None,
    resume: bool = False,
    loops: bool = True,
    cameras: str | Path | None = None,
    profile: bool = False,
    group: dist.ProcessGroup | None = None,
    say: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Reconstruction:
    """Cameras, depth, points, tracks and the dynamics mask of a video or of pictures.

    >>> scene = reconstruct("video.mp4")  # nothing is written
    >>> scene = reconstruct("photos/*.jpg", out="out", formats=["ply", "trajectory"])

    Args:
        inputs: a video, a folder of images, image files or patterns such as "photos/*.jpg" (docs/inputs.md). None: the bundled clip.
            Of a COLMAP model or a transforms.json, its images; `Reconstruction.frames.known` keeps its cameras.
        out: folder for the results. None: nothing is written, and the results must fit into the memory.
        weights: nano (bundled), page4d, page4d-mask or vggt (Hugging Face hub), a .pt or .safetensors file, or random[:PRESET].
        formats: some of `page4d.export.FORMATS`, see docs/formats.md. None, or "default" among them: all that apply and need no further
            package. Without `out` they only choose what is computed.
        moving, glb, depth_size, depth_type: see `page4d.export.ExportOptions`.
        frames: at most so many, evenly spaced; default 32, or all with `stride`, `fps` or `chunk`.
        stride, fps: take every stride-th frame, or about so many per second of video.
        size: of the network's input, a width or (height, width), in multiples of 14. Default: by the weights.
        fit: "crop" or "pad", how pictures are fitted to the size.
        value_range: "auto" or "full", of pictures with more than 8 bits.
        device: cuda, cpu or mps. Default: the best there is.
        dtype: of the trunk's matmuls. Default: half precision on cuda, else fp32.
        memory_budget: bytes beyond the weights. Default: 0.9 of the free memory.
        attn: attention backend. Default: PAGE4D_ATTN, else auto.
        mask_strength: of the dynamics mask, 0 = off. Default: stored with the weights.
        attention: what the patches of each global layer see: exact (default), balanced, fast, a cell such as 2x2, a .json file, or a plan
            (docs/attention_plans.md).
        attention_check: rows of each layer that is not dense by which its deviation is measured. 0: none.
        query_points: x, y in pixels of the first picture, to track. track_grid: N x N points spread over it instead.
        chunk: run a long video in chunks of N frames, or (N, overlap), or "N,overlap" (docs/long_video.md). "off": one pass over all.
            Default: one pass, unless it does not fit the memory, or the weights are known to be better in chunks.
        resume: go on with the run in chunks that was stopped in `out`, if there is one.
        loops: look for places that the video comes back to, in a run in chunks.
        cameras: a file with known cameras: cameras.json, a TUM trajectory, a COLMAP model or a transforms.json. The result is brought into
            their world and unit, and known intrinsics replace predicted ones. The network does not see them.
        profile: also write trace.json into `out`.
        group: processes that share the work. This one is its rank 0, and the others call `serve` (docs/several_gpus.md).
        say: called with each line of progress, such as `print`.
        progress: show progress bars.

    Raises:
        UserError: of one line, for what the caller can mend. Options are checked before the work starts, as far as possible.
        RankError: another process of the group failed.
        BackendError: the attention backend cannot serve.
    """
    say = say or (lambda text: None)
    with contextlib.ExitStack() as stack:
        opened = open_device(device)
        if group is not None:
            stack.enter_context(Ranks.of(group, opened).guard())
        for registry in registries().values():
            registry.requested()
        env.flag("PAGE4D_NVTX"), env.flag("PAGE4D_DEBUG"), qualification_mode()
        written_as = ExportOptions(moving=moving, glb=glb, depth_size=depth_size, depth_type=depth_type)
        checked = check_formats([DEFAULT] if formats is None else formats, written_as)
        formats = None if formats is None else checked
        folder = None if out is None else Path(out)
        if folder is not None:
            check_writable(folder)
        elif profile:
            raise InputError("profile writes trace.json: give a folder for it with out")
        config = check_weights(weights)
        plan = AttentionPlan.of(attention, config)
        check_rows(attention_check)
        wish = chunked.Wish.of(chunk, query_points is not None or track_grid is not None, folder, resume)
        known_file = None if cameras is None else read_cameras(cameras)
        paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
        dtype = dtype or default_dtype(opened)
        recording = stack.enter_context(record(opened))
        stack.enter_context(use_backend(attn) if attn else contextlib.nullcontext())
        work = folder
        if folder is None and (wish.chunking is not None or group is not None):
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="page4d-")))
        leader: Leader | None = None
        if group is not None and work is not None:
            leader = Leader(group, opened, work, weights, dtype, attn)
            stack.callback(leader.close)
        if frames is None and stride is None and fps is None and wish.chunking is None:
            frames = DEFAULT_FRAMES
        sampling = {"max_frames": frames, "stride": stride, "fps": fps, "size": size, "mode": fit, "value_range": value_range}
        images = leader.arrays.allocate if leader is not None else None if work is None else on_disk(work)
        read = read_inputs(paths, folder, images, config, sampling, say, progress)
        known = None if known_file is None else chunked.known_cameras(known_file, read)
        model = open_model(weights, opened, dtype, say=say)
        queries = query_tensor(read, query_points, track_grid)
        if registries()["mask_attention"].requested() == "auto":
            judged = first_run(opened, model.aggregator.compute_dtype)
            if judged:
                say(judged)
        outputs = _outputs(model, formats, queries is not None, known is not None)
        strength = model.config.mask_strength if mask_strength is None else mask_strength
        calls = registries()["mask_attention"].calls
        mask_attention(*torch.zeros(3, 1, 1, 1, 8), backend="chunked")  # the first call of an operator imports what it needs
        calls.clear()
        common = budget_of(opened) if leader is None else leader.budget()
        if leader is not None:
            leader.share(read.images)
        budget = common if memory_budget is None else memory_budget
        if wish.record is not None and memory_budget is None:
            budget = wish.record["memory_budget"]  # other plans would round otherwise
        job = _Job(model, read, queries, outputs, plan, attention_check, strength, budget, opened, say, progress, leader)
        chunking = job.decide(wish)
        if wish.record is not None and chunking is None:
            raise InputError(
                f"the run in {str(folder)!r} had more frames: resume with the same options, or remove its folder {chunked.FOLDER}"
            )
        if chunking is not None:
            check_outputs(model)
            work = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="page4d-")))
            options = {"mask_strength": strength, "outputs": sorted({*outputs, *needed(model)})}
            options |= {"attention": plan.to_json(), "attention_check": attention_check, "processes": job.ranks}
            store = Store(
                work / chunked.FOLDER,
                chunked.record(weights, model, read, chunking, budget, opened, options),
                resume=wish.record is not None,
            )
            if resume and wish.record is None:
                say(f"nothing to go on with in {str(store.folder)!r}: starting from the beginning")
            if wish.record is not None:
                say(f"going on with the run in {str(store.folder)!r}")
                sweep(work, FOLDERS, () if leader is None else leader.arrays.paths)
        weights_bytes = peak_bytes(opened)
        found: LongVideo | None = None
        with _profile(folder if profile else None, opened), torch.inference_mode():
            start = time.perf_counter()
            if chunking is None:
                prediction = job.one_pass(recording, _in_memory if folder is None else on_disk(folder))
                alone = None if known is None else prediction.cameras
            else:
                found = job.in_chunks(chunking, store, on_disk(store.folder), loops, known)
                prediction = found.prediction
                alone = Cameras(found.unanchored[None], replace(prediction, intrinsics=None).cameras.intrinsics)
            off = None
            if known is not None and alone is not None:
                off = chunked.distance(alone, *known)
                if found is None:
                    prediction = _in_known_world(prediction, *known)
                off["after"] = chunked.apart(prediction.cameras, *known)
            seconds = time.perf_counter() - start
        files: list[Path] = []
        if folder is not None:
            with stage("export"):
                files = export(prediction, read, folder, formats, written_as, progress=progress)
                files += export_chunks(folder, None if found is None else as_json(found))
        if chunking is not None:
            store.remove()
        if leader is not None:
            leader.end()
    if folder is not None and profile:
        files.append(folder / "trace.json")
    if opened.type == "cuda":
        say(f"memory: {(peak_bytes(opened) - weights_bytes) / 2**30:.2f} GiB beyond the weights were used")
    return Reconstruction(prediction, read, files, opened, seconds, recording, Counter(calls), strength, plan, found, off)


@dataclass(frozen=True)
class _Job:
    """The model, what it is given and what it is asked for."""

    model: Page4D
    frames: Frames
    queries: Tensor | None
    outputs: list[str]
    attention: AttentionPlan
    attention_check: int
    mask_strength: float
    budget: int | None
    device: torch.device
    say: Callable[[str], None]
    progress: bool
    leader: Leader | None  # of several processes

    @property
    def ranks(self) -> int:
        return 1 if self.leader is None else self.leader.size

    @property
    def options(self) -> dict[str, Any]:
        """Of `Page4D.forward`, whether for one pass or for many."""
        return {"mask_strength": self.mask_strength, "memory_budget": self.budget, "attention_check": self.attention_check}

    def plan(self, frames: int, outputs: Collection[str]) -> MemoryPlan:
        """Of a pass over so many frames."""
        shape, points = (1, frames, *self.frames.images.shape[1:]), 0 if self.queries is None else len(self.queries)
        where = {"images_on_device": self.device.type == "cpu", "results_on_device": False}
        return self.model.plan(shape, outputs, self.budget, **where, points=points, attention=self.attention, ranks=self.ranks)

    def decide(self, wish: chunked.Wish) -> Chunking | None:
        """The chunks, None for one pass. Say which, and what it needs."""

        def fits(frames: int) -> bool:
            return self.budget is None or self.plan(frames, {*self.outputs, *needed(self.model)}).bytes <= self.budget

        total = len(self.frames)
        chosen = wish.decide(self.model, total, fits)
        if chosen is not None:
            number = len(chosen.divide(total))
            why = ""
            if wish.chunking is None and wish.record is None:
                short = "one pass does not fit the memory" if not fits(total) else "these weights are better in chunks at this length"
                why = f" ({short}; --chunk off forbids it)"
            self.say(f"chunks: {count(self.frames)} in {number} passes over {chosen}{why}")
        plan = self.plan(total, self.outputs) if chosen is None else self.plan(chosen.size, {*self.outputs, *needed(self.model)})
        if self.leader is not None:
            self.say(self.leader.in_words(self.model.config, total if chosen is None else chosen.size))
        self.say(f"memory: {plan}{'' if self.leader is None else ', in each process'}")
        if self.budget is not None and plan.bytes > self.budget:
            self.say(f"memory: this is over the budget of {self.budget / 2**30:.2f} GiB, but no smaller plan exists")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return chosen

    def one_pass(self, recording: Recording, allocate: Allocate) -> Prediction:
        stages = 2 + 2 * self.model.config.depth + len(self.outputs)
        with _stage_bar(recording, stages, self.progress):
            options = {**self.options, "outputs": self.outputs, "attention": self.attention, "allocate": allocate}
            if self.leader is not None:
                return self.leader.predict(self.model, self.frames.images, {**options, "query_points": self.queries}, False)[0]
            return self.model(self.frames.images[None], self.queries, **options).to("cpu")

    def in_chunks(
        self, chunking: Chunking, store: Store, allocate: Allocate, loops: bool, known: tuple[list[int], Cameras] | None
    ) -> LongVideo:
        inside = self.frames.inside()
        with chunked.frame_bar(len(self.frames), self.device, self.progress) as advance, chunked.kept(store, self.say):
            return predict_in_chunks(
                self.model,
                self.frames.images,
                chunking,
                store,
                allocate,
                outputs=self.outputs,
                attention=self.attention,
                loops=loops,
                known=known,
                valid=None if bool(inside.all()) else inside,
                advance=advance,
                passes=Passes if self.leader is None else self.leader.passes,
                **self.options,
            )


def _in_known_world(prediction: Prediction, which: list[int], known: Cameras) -> Prediction:
    """The prediction in the world of known cameras. Depth and points change in place, as they may be larger than the memory.

    Raises:
        AlignmentError: the predicted cameras stand still, or disagree with the known ones.
    """
    similarity, _ = anchor(prediction.cameras.extrinsics[0, which], known.extrinsics)
    whole = prediction.tensors()
    poses = []
    for index in range(prediction.images.shape[1]):
        there = moved(prediction.frame(index), similarity).tensors()
        for name in {"depth", "world_points"} & there.keys():
            whole[name][:, index] = there[name][:, 0]
        poses.append(there["pose_enc"])
    return with_intrinsics(replace(prediction, pose_enc=torch.cat(poses, 1), pose_enc_list=None), which, known)


def _outputs(model: Page4D, formats: Sequence[str] | None, tracks: bool, known: bool) -> list[str]:
    """The model outputs that the formats need; all outputs without formats. Missing inputs are reported before the work starts.

    `known`: there are known cameras to compare with.
    """
    outputs = [name for name in OUTPUTS if name in model.available]
    if tracks and "track" not in model.available:
        raise InputError("these weights have no track head: for tracks use weights that have one, such as --weights vggt")
    if known and "camera" not in outputs:
        raise InputError("--cameras needs predicted cameras to align with: these weights have no head for them")
    if formats is None:
        return outputs
    have = set().union(*(FIELDS[name] for name in outputs), {"track"} if tracks else set())
    formats = expanded(formats, have)
    for name in formats:
        needed = FORMATS[name].needed
        if not set(needed) <= have:
            advice = "give --query-points or --track-grid" if name == "tracks" else "these weights have no head for it"
            raise InputError(f"--export {name} needs {', '.join(needed)}: {advice}")
    if {"npz", "overview"} & set(formats):
        return outputs
    used = {field for name in formats for field in (*FORMATS[name].needed, *FORMATS[name].helped)}
    return [name for name in outputs if FIELDS[name] & used or (known and name == "camera")] or outputs[:1]


def _in_memory(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape)


@contextlib.contextmanager
def _stage_bar(recording: Recording, total: int, progress: bool) -> Iterator[None]:
    """A progress bar over the stages of the model."""
    with tqdm(total=total, desc="model", unit="stage", disable=None if progress else True) as bar:

        def advance(name: str) -> None:
            if name.startswith(EXCHANGE):
                return
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        recording.on_stage = advance
        yield
        recording.on_stage = None
        bar.total = bar.n


@contextlib.contextmanager
def _profile(out: Path | None, device: torch.device) -> Iterator[None]:
    """Write a torch.profiler trace of the block to `out`/trace.json."""
    if out is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    with AtomicFiles() as files:
        profiler.export_chrome_trace(str(files.add(out / "trace.json")))
