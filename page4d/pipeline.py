"""From pictures to a reconstruction in one call. `page4d infer` is this function with options."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from page4d_kernels import env, mask_attention, registries, use_backend
from page4d_kernels.profiling import Recording, peak_bytes, record, stage
from page4d_kernels.qualify.__main__ import first_run
from page4d_kernels.qualify.record import mode as qualification_mode

from .config import Layer, Page4DConfig
from .data import Frames, bundled_clip, load_frames
from .data.images import is_image
from .data.preprocess import DEFAULT_SIZE, Size
from .data.sources import Source, resolve
from .errors import InputError
from .execution.attention_plan import CHECKED_ROWS, AttentionPlan, check_rows
from .execution.memory import budget_of
from .export import DEFAULT, FOLDERS, FORMATS, ExportOptions, check_formats, expanded, export
from .files import AtomicFiles, check_writable, on_disk
from .model import OUTPUTS, Page4D, default_dtype
from .model.opening import DEFAULT_WEIGHTS, check_weights, open_device, open_model
from .prediction import Cameras, Prediction

__all__ = ["Reconstruction", "reconstruct"]

DEFAULT_FRAMES = 32
BUNDLED_SIZE = 336  # the bundled clip's own width
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
    profile: bool = False,
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
        frames: at most so many, evenly spaced; default 32, or all with `stride` or `fps`.
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
        profile: also write trace.json into `out`.
        say: called with each line of progress, such as `print`.
        progress: show progress bars.

    Raises:
        UserError: of one line, for what the caller can mend. Options are checked before the work starts, as far as possible.
        BackendError: the attention backend cannot serve.
    """
    say = say or (lambda text: None)
    opened = open_device(device)
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
    paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    with record(opened) as recording, use_backend(attn) if attn else contextlib.nullcontext():
        if frames is None and stride is None and fps is None:
            frames = DEFAULT_FRAMES
        sampling = {"max_frames": frames, "stride": stride, "fps": fps, "size": size, "mode": fit, "value_range": value_range}
        read = _read(paths, folder, config, sampling, say, progress)
        model = open_model(weights, opened, dtype or default_dtype(opened), say=say)
        queries = _queries(read, query_points, track_grid)
        if registries()["mask_attention"].requested() == "auto":
            judged = first_run(opened, model.aggregator.compute_dtype)
            if judged:
                say(judged)
        outputs = _outputs(model, formats, queries is not None)
        strength = model.config.mask_strength if mask_strength is None else mask_strength
        calls = registries()["mask_attention"].calls
        mask_attention(*torch.zeros(3, 1, 1, 1, 8), backend="chunked")  # the first call of an operator imports what it needs
        calls.clear()
        budget = budget_of(opened) if memory_budget is None else memory_budget
        _plan(model, read, queries, outputs, plan, budget, opened, say)
        weights_bytes = peak_bytes(opened)
        stages = 2 + 2 * model.config.depth + len(outputs)
        with _stage_bar(recording, stages, progress), _profile(folder if profile else None, opened), torch.inference_mode():
            start = time.perf_counter()
            prediction = model(
                read.images[None], queries, outputs=outputs, mask_strength=strength, memory_budget=budget,
                allocate=_in_memory if folder is None else on_disk(folder), attention=plan, attention_check=attention_check,
            ).to("cpu")  # fmt: skip
            seconds = time.perf_counter() - start
        files: list[Path] = []
        if folder is not None:
            with stage("export"):
                files = export(prediction, read, folder, formats, written_as, progress=progress)
    if folder is not None and profile:
        files.append(folder / "trace.json")
    if opened.type == "cuda":
        say(f"memory: {(peak_bytes(opened) - weights_bytes) / 2**30:.2f} GiB beyond the weights were used")
    return Reconstruction(prediction, read, files, opened, seconds, recording, Counter(calls), strength, plan)


def _read(
    inputs: list[str | Path], out: Path | None, config: Page4DConfig, sampling: dict, say: Callable[[str], None], progress: bool
) -> Frames:
    default: Size = DEFAULT_SIZE
    if not inputs:
        inputs = [bundled_clip()]
        say("no input given: using the bundled clip, a rendered scene with a moving camera and moving objects")
        default = BUNDLED_SIZE
    source = resolve(inputs)
    if out is not None:
        _check_out(out, source)
    if sampling["size"] is None:
        sampling = sampling | {"size": config.image_size or default}
    with stage("preprocess"):
        frames = load_frames(source, **sampling, progress=progress)
    if frames.known is not None:
        say(f"{len(frames)} cameras were read with the pictures; the network does not see them, and Frames.known keeps them")
    height, width = frames.images.shape[-2:]
    say(f"{count(frames)} at {height} x {width}{_cut(frames)}")
    return frames


def _check_out(out: Path, source: Source) -> None:
    """InputError if results would be written among the files that are read: a later run would read them, or this one replace them."""
    written = {(out / folder).resolve() for folder in FOLDERS}
    if source.cameras is not None:
        folder = source.cameras if source.cameras.is_dir() else source.cameras.parent
        if folder.resolve() in written:
            raise InputError(f"the results would be written beside the input's cameras, in {str(folder)!r}: choose another --out")
    for path in source.paths:
        if is_image(path) and {path.resolve().parent, path.parent.resolve()} & written:
            raise InputError(f"the results would be written among the input's pictures, in {str(path.parent)!r}: choose another --out")


def _cut(frames: Frames) -> str:
    """A note on how much of the worst frame is cropped."""
    size = torch.tensor(frames.original_sizes, dtype=torch.float64).flip(1) * frames.scale  # (S, 2) width, height before the crop
    seen = (torch.tensor(frames.images.shape[:-3:-1]) / size).clamp(max=1).prod(1)
    worst = int(seen.argmin())
    if seen[worst] >= 0.95:
        return ""
    which = "each picture" if seen.max() - seen.min() < 0.01 else f"the picture {frames.names[worst]!r}, the most of all,"
    return f"; {1 - float(seen[worst]):.0%} of {which} is cropped (--fit pad keeps it)"


def count(frames: Frames) -> str:
    return f"{len(frames)} frame" + ("s" if len(frames) > 1 else "")


def _queries(frames: Frames, given: Sequence[tuple[float, float]] | None, grid: int | None) -> Tensor | None:
    """(N, 2) in pixels of the processed first frame."""
    height, width = frames.images.shape[-2:]
    if given is not None:
        if grid is not None:
            raise InputError("query points and a track grid exclude each other: give only one of them")
        rows, columns = frames.original_sizes[0]
        points = torch.tensor([list(point) for point in given], dtype=torch.float32).view(-1, 2)
        outside = (points < 0).any(1) | (points[:, 0] > columns - 1) | (points[:, 1] > rows - 1) | ~points.isfinite().all(1)
        if outside.any():
            x, y = points[outside][0].tolist()
            raise InputError(f"query point {x:g},{y:g} is outside the first frame of {rows} x {columns} pixels (height x width)")
        points = frames.points_from_original(points)
        outside = (points < -0.5).any(1) | (points[:, 0] > width - 0.5) | (points[:, 1] > height - 0.5)
        if outside.any():
            x, y = given[int(outside.nonzero()[0])]
            raise InputError(f"query point {x:g},{y:g} is in a cropped part of the frame: use --fit pad, or another point")
        return points
    if grid is None:
        return None
    if grid < 1:
        raise InputError(f"the track grid must be at least 1, not {grid}")
    steps = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(steps * height - 0.5, steps * width - 0.5, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def _outputs(model: Page4D, formats: Sequence[str] | None, tracks: bool) -> list[str]:
    """The model outputs that the formats need; all outputs without formats. Missing inputs are reported before the work starts."""
    outputs = [name for name in OUTPUTS if name in model.available]
    if tracks and "track" not in model.available:
        raise InputError("these weights have no track head: for tracks use weights that have one, such as --weights vggt")
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
    return [name for name in outputs if FIELDS[name] & used] or outputs[:1]


def _plan(
    model: Page4D,
    frames: Frames,
    queries: Tensor | None,
    outputs: list[str],
    attention: AttentionPlan,
    budget: int | None,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Say what the pass will need."""
    where = {"images_on_device": device.type == "cpu", "results_on_device": False}
    plan = model.plan(
        (1, *frames.images.shape), outputs, budget, **where, points=0 if queries is None else len(queries), attention=attention
    )
    say(f"memory: {plan}")
    if budget is not None and plan.bytes > budget:
        say(f"memory: this is over the budget of {budget / 2**30:.2f} GiB, but no smaller plan exists")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _in_memory(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape)


@contextlib.contextmanager
def _stage_bar(recording: Recording, total: int, progress: bool) -> Iterator[None]:
    """A progress bar over the stages of the model."""
    with tqdm(total=total, desc="model", unit="stage", disable=None if progress else True) as bar:

        def advance(name: str) -> None:
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
