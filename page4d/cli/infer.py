"""`page4d infer [INPUT ...]`: read frames, run the model, write files, report what it cost."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from page4d_kernels import env, mask_attention, registries, use_backend
from page4d_kernels.profiling import Recording, peak_bytes, record, stage
from page4d_kernels.qualify.__main__ import first_run
from page4d_kernels.qualify.record import mode as qualification_mode

from ..config import Page4DConfig
from ..data import Frames, bundled_clip, load_frames
from ..data.deep import RULES
from ..data.images import is_image
from ..data.preprocess import DEFAULT_SIZE
from ..data.sources import resolve
from ..errors import InputError, one_line
from ..execution.memory import budget_of
from ..export import EXPORTERS, FOLDERS, NEEDED, export
from ..files import AtomicFiles, check_writable, on_disk
from ..model import OUTPUTS, Page4D, default_dtype
from .common import (
    DEFAULT_WEIGHTS,
    DTYPES,
    WEIGHTS_HELP,
    check_weights,
    open_device,
    open_model,
    parse_bytes,
    parse_folder,
    parse_names,
    parse_size,
    run_command,
    say,
)
from .parser import Parser

DEFAULT_FRAMES = 32


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog, description="Cameras, depth, points, tracks and the dynamics mask of a video.")
    parser.add_argument("input", nargs="*", help="a video, a folder of images, or image files (default: the bundled clip)")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, help=WEIGHTS_HELP)
    parser.add_argument("--out", type=parse_folder, default=Path("out"), help="folder for the results (default: out)")
    parser.add_argument(
        "--frames", type=int, help=f"at most this many frames, evenly spaced (default: {DEFAULT_FRAMES}, or all with --stride or --fps)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="take every N-th frame")
    parser.add_argument("--fps", type=float, help="sample a video at about this many frames per second")
    parser.add_argument(
        "--size", type=parse_size, help="network input: a width, or HEIGHTxWIDTH; multiples of 14 (default: by the weights)"
    )
    parser.add_argument("--fit", choices=("crop", "pad"), default="crop", help="fit pictures to the size by cropping or white padding")
    parser.add_argument(
        "--range", choices=RULES, default="auto", help="pictures of more than 8 bits: the range that the clip uses, or all (docs/inputs.md)"
    )
    parser.add_argument("--device", help="cuda, cpu or mps (default: the best available)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the trunk's matmuls (default: half precision on cuda, else fp32)")
    parser.add_argument(
        "--memory-budget",
        type=parse_bytes,
        metavar="SIZE",
        help="memory beyond the weights, such as 6G (default: 0.9 of the free memory)",
    )
    parser.add_argument("--attn", help="attention backend, see `page4d info` (default: PAGE4D_ATTN, else auto)")
    parser.add_argument("--mask-strength", type=float, help="strength of the dynamics mask, 0 = off (default: stored with the weights)")
    parser.add_argument("--export", type=_formats, help=f"comma-separated list of {', '.join(EXPORTERS)} (default: all that apply)")
    points = parser.add_mutually_exclusive_group()
    points.add_argument("--query-points", nargs="+", metavar="X,Y", help="track these pixels of the first frame (original resolution)")
    points.add_argument("--track-grid", type=int, metavar="N", help="track N x N points spread over the first frame")
    parser.add_argument("--profile", action="store_true", help="also write trace.json for chrome://tracing or Perfetto")
    return parser


def _formats(text: str) -> list[str]:
    formats = parse_names(text)
    unknown = [name for name in formats if name not in EXPORTERS]
    if unknown or not formats:
        raise argparse.ArgumentTypeError(f"unknown format {', '.join(unknown) or text!r}: choose from {', '.join(EXPORTERS)}")
    return formats


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = build_parser(prog).parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> str:
    """Run inference by the options and return the report. Options are checked before the work starts, as far as possible."""
    device = open_device(args.device)
    for registry in registries().values():
        registry.requested()
    env.flag("PAGE4D_NVTX"), env.flag("PAGE4D_DEBUG"), qualification_mode()
    check_writable(args.out)
    config = check_weights(args.weights)
    with record(device) as recording, use_backend(args.attn) if args.attn else contextlib.nullcontext():
        frames = _frames(args, config)
        model = open_model(args.weights, device, DTYPES[args.dtype] if args.dtype else default_dtype(device))
        queries = _query_points(args, frames)
        if registries()["mask_attention"].requested() == "auto":
            judged = first_run(device, model.aggregator.compute_dtype)
            if judged:
                say(judged)
        outputs = _outputs(model, args.export, queries is not None)
        strength = model.config.mask_strength if args.mask_strength is None else args.mask_strength
        calls = registries()["mask_attention"].calls
        mask_attention(*torch.zeros(3, 1, 1, 1, 8), backend="chunked")  # the first operator call imports torch's compiler
        calls.clear()

        budget = budget_of(device) if args.memory_budget is None else args.memory_budget
        where = {"images_on_device": device.type == "cpu", "results_on_device": False}
        plan = model.plan((1, *frames.images.shape), outputs, budget, **where, points=0 if queries is None else len(queries))
        say(f"memory: {plan}")
        if budget is not None and plan.bytes > budget:
            say(f"memory: this is over the budget of {budget / 2**30:.2f} GiB, but no smaller plan exists")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        weights = peak_bytes(device)

        total = 2 + 2 * model.config.depth + len(outputs)
        with _StageBar(total=total, desc="model", unit="stage", disable=None) as bar:
            recording.on_stage = bar.advance
            with _profile(args.out if args.profile else None, device), torch.inference_mode():
                start = time.perf_counter()
                prediction = model(
                    frames.images[None], queries, outputs=outputs, mask_strength=strength, memory_budget=budget, allocate=on_disk(args.out)
                ).to("cpu")
                seconds = time.perf_counter() - start
            recording.on_stage = None
            bar.total = bar.n
        with stage("export"):
            files = export(prediction, frames, args.out, args.export, progress=True)
    if args.profile:
        files.append(args.out / "trace.json")
    served = ", ".join(f"{name} ({count} calls)" for name, count in calls.most_common())
    if device.type == "cuda":
        say(f"memory: {(peak_bytes(device) - weights) / 2**30:.2f} GiB beyond the weights were used")
    facts = [f"attention by {served}", f"mask strength {strength:g}" + (" (off)" if strength == 0 else "")]
    return summary(frames, recording, seconds, device, facts, files)


def _frames(args: argparse.Namespace, config: Page4DConfig) -> Frames:
    limit = args.frames
    if limit is None and args.stride is None and args.fps is None:
        limit = DEFAULT_FRAMES
    inputs: list[str | Path] = list(args.input)
    default = DEFAULT_SIZE
    if not inputs:
        inputs = [bundled_clip()]
        say("no input given: using the bundled clip, a rendered scene with a moving camera and moving objects")
        default = BUNDLED_SIZE
    paths = resolve(inputs)
    _check_out(args.out, paths)
    with stage("preprocess"):
        size = (config.image_size or default) if args.size is None else args.size
        frames = load_frames(
            paths, size=size, mode=args.fit, max_frames=limit, stride=args.stride, fps=args.fps, value_range=args.range, progress=True
        )
    height, width = frames.images.shape[-2:]
    say(f"{count(frames)} at {height} x {width}{_cut(frames)}")
    return frames


def _check_out(out: Path, paths: list[Path]) -> None:
    """InputError if results would be written among the pictures that are read: a later run would read them, or this one replace them."""
    written = {(out / folder).resolve() for folder in FOLDERS}
    for path in paths:
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


BUNDLED_SIZE = 336  # the clip's own width


def _query_points(args: argparse.Namespace, frames: Frames) -> Tensor | None:
    """(N, 2) in pixels of the processed first frame."""
    if args.query_points is not None:
        try:
            pairs = [[float(value) for value in text.split(",")] for text in args.query_points]
            points = torch.tensor(pairs).view(len(pairs), 2)
        except (ValueError, RuntimeError):
            raise InputError(
                f"--query-points {' '.join(args.query_points)}: give pixels as X,Y such as 120,80 200,150, after the input"
            ) from None
        height, width = frames.original_sizes[0]
        outside = (points < 0).any(1) | (points[:, 0] > width - 1) | (points[:, 1] > height - 1) | ~points.isfinite().all(1)
        if outside.any():
            first = args.query_points[int(outside.nonzero()[0])]
            raise InputError(f"query point {first} is outside the first frame of {height} x {width} pixels (height x width)")
        points = frames.points_from_original(points)
        height, width = frames.images.shape[-2:]
        outside = (points < -0.5).any(1) | (points[:, 0] > width - 0.5) | (points[:, 1] > height - 0.5)
        if outside.any():
            first = args.query_points[int(outside.nonzero()[0])]
            raise InputError(f"query point {first} is in a cropped part of the frame: use --fit pad, or another point")
        return points
    if args.track_grid is not None:
        if args.track_grid < 1:
            raise InputError(f"--track-grid must be at least 1, not {args.track_grid}")
        height, width = frames.images.shape[-2:]
        steps = (torch.arange(args.track_grid) + 0.5) / args.track_grid
        y, x = torch.meshgrid(steps * height - 0.5, steps * width - 0.5, indexing="ij")
        return torch.stack([x, y], -1).flatten(0, 1)
    return None


FIELDS = {"camera": {"pose_enc"}, "depth": {"depth", "depth_conf"}, "points": {"world_points"}, "mask": {"mask"}}


def _outputs(model: Page4D, formats: list[str] | None, tracks: bool) -> list[str]:
    """The model outputs that the formats need; all outputs without formats. Missing inputs are reported before the work starts."""
    outputs = [name for name in OUTPUTS if name in model.available]
    if tracks and "track" not in model.available:
        raise InputError("these weights have no track head: for tracks use weights that have one, such as --weights vggt")
    if formats is None:
        return outputs
    have = set().union(*(FIELDS[name] for name in outputs), {"track"} if tracks else set())
    for name in formats:
        if not set(NEEDED[name]) <= have:
            advice = "give --query-points or --track-grid" if name == "tracks" else "these weights have no head for it"
            raise InputError(f"--export {name} needs {', '.join(NEEDED[name])}: {advice}")
    if {"npz", "overview"} & set(formats):
        return outputs
    needed = {field for name in formats for field in NEEDED[name]}
    return [name for name in outputs if FIELDS[name] & needed] or outputs[:1]


class _StageBar(tqdm):
    def advance(self, name: str) -> None:
        self.set_postfix_str(name, refresh=False)
        self.update()


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


def count(frames: Frames) -> str:
    return f"{len(frames)} frame" + ("s" if len(frames) > 1 else "")


def summary(frames: Frames, recording: Recording, seconds: float, device: torch.device, facts: list[str], files: list[Path]) -> str:
    """The report: seconds and peak memory per stage, the run in one line, the files."""
    kind = "allocated" if device.type == "cuda" else "resident"
    lines = [f"{'stage':<16}{'runs':>5}{'seconds':>10}{f'peak so far, GiB {kind}':>30}"]
    groups: dict[str, list] = {}
    for name, cost in recording.stages.items():
        head, _, index = name.partition(" ")
        groups.setdefault(f"{head} blocks" if index.isdigit() else name, []).append(cost)
    for name, costs in groups.items():
        runs, spent = sum(cost.runs for cost in costs), sum(cost.seconds for cost in costs)
        lines.append(f"{name:<16}{runs:>5}{spent:>10.2f}{max(cost.peak_bytes for cost in costs) / 2**30:>30.2f}")
    peak = peak_bytes(device) / 2**30
    lines.append(f"{count(frames)} in {seconds:.2f} s ({len(frames) / seconds:.2f} frames/s) on {device}, peak {peak:.2f} GiB {kind}")
    lines.append(", ".join(facts))
    lines.append(one_line(f"{len(files)} files in {files[0].parent}:") if files else "no files written")
    folders: dict[Path, list[str]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file.name)
    for folder, names in folders.items():
        shown = ", ".join(names[:8]) + (f" ... ({len(names)})" if len(names) > 8 else "")
        lines.append("  " + one_line(f"{folder}: {shown}"))
    return "\n".join(lines)
