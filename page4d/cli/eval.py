"""`page4d eval DATA ...`: run a model on sequences with ground truth, print a table of metrics, write JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import __version__
from ..data.preprocess import DEFAULT_SIZE
from ..evaluation.depth import ALIGNMENTS
from ..evaluation.evaluate import TASKS, check_tasks, evaluate
from ..evaluation.protocol import Protocol
from ..evaluation.readers import SPECS, open_dataset
from ..evaluation.report import table, write_json
from ..execution.attention_plan import AttentionPlan
from ..files import check_writable
from ..long_video.chunks import Chunking
from ..model import default_dtype
from ..model.opening import DEFAULT_WEIGHTS, DTYPES, check_weights, open_device, open_model
from .common import PLAN_HELP, WEIGHTS_HELP, parse_names, parse_size, run_command, say
from .parser import Parser


def build_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = Parser(
        prog,
        description="Metrics of cameras, depth, points, tracks and the motion mask against ground truth.",
    )
    parser.add_argument("data", nargs="+", help=f"{', '.join(SPECS)}; each has its own means")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, help=WEIGHTS_HELP)
    parser.add_argument("--tasks", type=parse_names, help=f"comma-separated, of {','.join(TASKS)} (default: all that apply except mono)")
    parser.add_argument("--frames", type=int, help="maximum number per sequence (default: as in the dataset's protocol)")
    parser.add_argument("--sequences", type=int, help="maximum number per dataset (default: all)")
    parser.add_argument(
        "--size",
        type=parse_size,
        help="network input: the longer side, or a HEIGHTxWIDTH to fit into (default: the training size of the weights)",
    )
    parser.add_argument(
        "--align", type=parse_names, default=["scale"], help=f"alignments of video depth, of {','.join(ALIGNMENTS)} (default: scale)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of synthetic scenes, the choice of compared points, and random weights")
    parser.add_argument("--mask-strength", type=float, help="strength of the dynamics mask, 0 = off (default: as stored in the weights)")
    parser.add_argument("--attention", default="exact", metavar="PLAN", help=PLAN_HELP)
    parser.add_argument("--chunk", metavar="N[,OVERLAP]", help="run longer sequences in chunks of N frames (default: one pass)")
    parser.add_argument(
        "--no-loops", dest="loops", action="store_false", help="in chunks: do not look for places that the video comes back to"
    )
    parser.add_argument("--device", help="cuda, cpu, mps (default: the best available)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the trunk's matmuls (default: half precision on cuda, else fp32)")
    parser.add_argument(
        "--official-protocol", action="store_true", help="repeat the official scripts, defects included, to compare with published numbers"
    )
    parser.add_argument("--out", type=Path, help="a .json file for all metrics and the settings they were measured with")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = build_parser(prog).parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> str:
    """The table of metrics. Everything that can be checked is checked before the work starts."""
    if args.out is not None:
        check_writable(args.out.parent)
    config = check_weights(args.weights)
    plan = AttentionPlan.of(args.attention, config)
    size = (config.image_size or DEFAULT_SIZE) if args.size is None else args.size
    chunk = None if args.chunk is None else Chunking.of(args.chunk)
    options = {"mask_strength": args.mask_strength, "attention": args.attention, "chunk": chunk, "loops": args.loops, "seed": args.seed}
    protocol = Protocol(size, args.official_protocol, tuple(args.align), **options)
    tasks = set(args.tasks) if args.tasks else None
    check_tasks(tasks)
    options = {"tasks": tasks, "frames": args.frames, "size": size, "seed": args.seed, "sequences": args.sequences}
    datasets = [open_dataset(spec, **options) for spec in args.data]
    device = open_device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    model = open_model(args.weights, device, dtype, args.seed, say)
    results = {
        spec: evaluate(model, data, tasks, protocol=protocol, rules=data.rules, progress=data.name)
        for spec, data in zip(args.data, datasets, strict=True)
    }
    if args.out is not None:
        provenance = {
            "weights": args.weights,
            "protocol": dataclasses.asdict(protocol) | {"attention": json.loads(plan.to_json())},
            "data": {spec: {"sequences": len(data), "frames": args.frames} for spec, data in zip(args.data, datasets, strict=True)},
            "tasks": sorted(tasks) if tasks else None,
            "seed": args.seed,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "versions": {"page4d": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        write_json(args.out, {"provenance": provenance, "results": results})
    return table(results)
