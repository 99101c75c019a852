"""`page4d infer [INPUT ...]`: read frames, run the model, write files, report what it cost."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from page4d_kernels.profiling import peak_bytes

from ..config import DENSE
from ..data.deep import RULES
from ..errors import one_line
from ..execution.attention_plan import CHECKED_ROWS
from ..export import DEFAULT, FORMATS
from ..export.options import CHOICES
from ..long_video.report import in_words
from ..model.opening import DEFAULT_WEIGHTS, DTYPES, own_device
from ..pipeline import Reconstruction, reconstruct, serve
from ..pipeline.inputs import DEFAULT_FRAMES, count
from ..viewer import Page, ViewOptions
from .common import CHUNK_HELP, PLAN_HELP, WEIGHTS_HELP, parse_bytes, parse_folder, parse_names, parse_size, run_command, say
from .launch import run_on_ranks
from .parser import Parser, first_speaks, launched
from .view import check_view, open_page, run_pages


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(
        prog, description="Cameras, depth, points, tracks and the dynamics mask of a video. Under torchrun, several processes share it."
    )
    parser.add_argument(
        "input",
        nargs="*",
        help="a video, a folder of images, image files, or images with cameras: COLMAP, transforms.json (default: the bundled clip)",
    )
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, help=WEIGHTS_HELP)
    parser.add_argument("--out", type=parse_folder, default=Path("out"), help="folder for the results (default: out)")
    parser.add_argument(
        "--frames",
        type=int,
        help=f"at most this many frames, evenly spaced (default: {DEFAULT_FRAMES}, or all with --stride, --fps or --chunk)",
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
    parser.add_argument(
        "--mask-strength",
        type=float,
        help="strength of the dynamics mask in attention, 0 = off (default: by the weights)",
    )
    usual = ", ".join(name for name, entry in FORMATS.items() if entry.default)
    more = ", ".join(name for name, entry in FORMATS.items() if not entry.default)
    parser.add_argument("--attention", default="exact", metavar="PLAN", help=PLAN_HELP)
    parser.add_argument(
        "--attention-check", type=int, default=CHECKED_ROWS, metavar="N", help="rows per layer that measure what a plan loses (default: 64)"
    )
    listing = f"comma-separated list of {usual}, {more}; default = all of the first {len(usual.split(','))} that apply, as in default,glb"
    parser.add_argument("--export", type=_formats, metavar="LIST", help=listing)
    parser.add_argument("--moving", type=float, default=0.5, help="motion, 0 to 1, above which a pixel counts as moving (default: 0.5)")
    parser.add_argument("--glb", choices=CHOICES["glb"], default="animated", help="what a glb shows of what moves (default: animated)")
    parser.add_argument("--depth-size", choices=CHOICES["depth_size"], default="network", help="size of the depth maps (default: network)")
    parser.add_argument("--depth-type", choices=CHOICES["depth_type"], default="png", help="type of the depth maps (default: png)")
    points = parser.add_mutually_exclusive_group()
    points.add_argument(
        "--query-points", nargs="+", type=_point, metavar="X,Y", help="track these pixels of the first frame (original resolution)"
    )
    points.add_argument("--track-grid", type=int, metavar="N", help="track N x N points spread over the first frame")
    parser.add_argument("--chunk", metavar="N[,OVERLAP]", help=CHUNK_HELP)
    parser.add_argument("--resume", action="store_true", help="go on with a run in chunks that was stopped, with the same options")
    parser.add_argument(
        "--no-loops", dest="loops", action="store_false", help="in chunks: do not look for places that the video comes back to"
    )
    parser.add_argument(
        "--cameras", type=Path, metavar="FILE", help="known cameras to align with: cameras.json, TUM, COLMAP folder, transforms.json"
    )
    parser.add_argument("--view", action="store_true", help="then show the scene in the browser, as `page4d view` does")
    parser.add_argument("--profile", action="store_true", help="also write trace.json for chrome://tracing or Perfetto")
    return parser


def _formats(text: str) -> list[str]:
    formats = parse_names(text)
    unknown = [name for name in formats if name not in (DEFAULT, *FORMATS)]
    if unknown or not formats:
        raise argparse.ArgumentTypeError(f"unknown format {', '.join(unknown) or text!r}: choose from {DEFAULT}, {', '.join(FORMATS)}")
    return formats


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    with first_speaks():
        args = build_parser(prog).parse_args(argv)
    pages: list[Page] = []
    if launched() is None:
        code = run_command(lambda: run(args, pages))
    else:
        code = run_on_ranks(args.device, lambda group: run(args, pages, group), serve)
    run_pages(pages)
    return code


def run(args: argparse.Namespace, pages: list[Page], group: dist.ProcessGroup | None = None) -> str:
    """Run inference by the options and return the report. With --view, add the page to `pages`. `group`: see `reconstruct`."""
    if args.view:
        check_view(args.export)
    scene = reconstruct(
        args.input,
        args.out,
        args.weights,
        formats=args.export,
        moving=args.moving,
        glb=args.glb,
        depth_size=args.depth_size,
        depth_type=args.depth_type,
        frames=args.frames,
        stride=args.stride,
        fps=args.fps,
        size=args.size,
        fit=args.fit,
        value_range=args.range,
        device=own_device(args.device),
        dtype=DTYPES[args.dtype] if args.dtype else None,
        memory_budget=args.memory_budget,
        attn=args.attn,
        mask_strength=args.mask_strength,
        attention=args.attention,
        attention_check=args.attention_check,
        query_points=args.query_points,
        track_grid=args.track_grid,
        chunk=args.chunk,
        resume=args.resume,
        loops=args.loops,
        cameras=args.cameras,
        profile=args.profile,
        group=group,
        say=say,
        progress=True,
    )
    if not args.view:
        return summary(scene)
    return f"{summary(scene)}\n{open_page(scene.prediction, scene.frames, ViewOptions(args.moving), pages)}"


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(value) for value in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a pixel: give pixels as X,Y such as 120,80 200,150, after the input") from None
    return x, y


def deviation(scene: Reconstruction) -> str:
    """The deviation of each layer that was measured, in words."""
    if len(scene.frames) == 1:
        return ": exact, with a single frame"
    measured = scene.prediction.attention_deviation
    if measured is None:
        return ", its deviation from exact attention was not measured"
    kinds = [kind if isinstance(kind, str) else "x".join(map(str, kind)) for kind in scene.plan.layers]
    layers = ", ".join(f"{kind} {value:.0%}" for kind, value in zip(kinds, measured.tolist(), strict=True) if kind != DENSE)
    return f": its layers deviate from exact attention by {layers}"


def known(off: dict[str, float]) -> str:
    """How far the prediction was from known cameras."""
    share = f" ({off['ate'] / off['ate_constant']:.1%} of how far they move)" if off["ate_constant"] > 0 else ""
    focal = "" if math.isnan(off["focal"]) else f", focal length off by {off['focal']:.1%}"
    return (
        f"known cameras of {off['frames']:.0f} frames: the prediction alone had an ATE of {off['ate']:.3g}{share} and an RPE of "
        f"{off['rpe_rot']:.2g} degrees{focal}; the result is {off['after']:.3g} (RMS) from them, all in their unit"
    )


def summary(scene: Reconstruction) -> str:
    """The report: seconds and peak memory per stage, the run in one line, the files."""
    frames, device, seconds, files = scene.frames, scene.device, scene.seconds, scene.files
    served = ", ".join(f"{name} ({calls} calls)" for name, calls in scene.attention.most_common())
    kind = "allocated" if device.type == "cuda" else "resident"
    lines = [f"{'stage':<20}{'runs':>5}{'seconds':>10}{f'peak so far, GiB {kind}':>30}"]
    groups: dict[str, list] = {}
    for name, cost in scene.recording.stages.items():
        head, _, index = name.partition(" ")
        groups.setdefault(f"{head} blocks" if index.isdigit() else name, []).append(cost)
    for name, costs in groups.items():
        runs, spent = sum(cost.runs for cost in costs), sum(cost.seconds for cost in costs)
        lines.append(f"{name:<20}{runs:>5}{spent:>10.2f}{max(cost.peak_bytes for cost in costs) / 2**30:>30.2f}")
    peak = peak_bytes(device) / 2**30
    lines.append(f"{count(frames)} in {seconds:.2f} s ({len(frames) / seconds:.2f} frames/s) on {device}, peak {peak:.2f} GiB {kind}")
    lines.append(f"attention by {served}, mask strength {scene.mask_strength:g}" + " (off)" * (scene.mask_strength == 0))
    if not scene.plan.exact:
        lines.append(f"attention plan {scene.plan.name}{deviation(scene)}")
    if scene.long_video is not None:
        lines += in_words(scene.long_video)
    if scene.known is not None:
        lines.append(known(scene.known))
    lines.append(one_line(f"{len(files)} files in {files[0].parent}:") if files else "no files written")
    folders: dict[Path, list[str]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file.name)
    for folder, names in folders.items():
        shown = ", ".join(names[:8]) + (f" ... ({len(names)})" if len(names) > 8 else "")
        lines.append("  " + one_line(f"{folder}: {shown}"))
    return "\n".join(lines)
