"""`page4d preview`: write a contact sheet and a video of synthetic scenes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..data.sample import Sample
from ..data.synthetic.dataset import SyntheticScenes
from ..data.synthetic.scene import KINDS
from ..data.video import write_video
from ..errors import InputError
from ..export.color import colormap, distinct, to_uint8
from ..files import AtomicFiles, check_writable
from .common import parse_folder, parse_size, run_command
from .parser import Parser

FPS = 8


def build_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = Parser(prog, description="Render synthetic scenes with exact ground truth: preview.png and preview.mp4.")
    parser.add_argument(
        "--preview", action="store_true", help=argparse.SUPPRESS
    )  # accepted for `python -m page4d.data.synthetic --preview`
    parser.add_argument("--kind", choices=KINDS, default="mixed", help="kind of scene (default: mixed)")
    parser.add_argument("--sequences", type=int, default=6, help="number of scenes (default: 6)")
    parser.add_argument("--frames", type=int, default=16, help="frames per scene (default: 16)")
    parser.add_argument("--size", type=parse_size, default=(112, 154), help="HEIGHTxWIDTH (default: 112x154)")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (default: 0)")
    parser.add_argument("--photographs", type=Path, help="a folder of images to use as textures as well")
    parser.add_argument("--motion-blur", type=int, default=1, metavar="N", help="instants averaged per frame (default: 1, no blur)")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="standard deviation of image noise, as a fraction of full scale (default: 0)"
    )
    parser.add_argument("--out", type=parse_folder, default=Path("out"), help="folder for preview.png and preview.mp4 (default: out)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = build_parser(prog).parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> str:
    if isinstance(args.size, int):
        raise InputError(f"--size {args.size}: give HEIGHTxWIDTH, such as 112x154")
    if args.sequences < 1:
        raise InputError(f"--sequences {args.sequences} must be at least 1")
    check_writable(args.out)
    scenes = SyntheticScenes(
        args.kind, frames=args.frames, size=args.size, seed=args.seed, length=args.sequences, tracks=64,
        photographs=args.photographs, motion_blur=args.motion_blur, noise=args.noise,
    )  # fmt: skip
    start = time.perf_counter()
    samples = [scenes[i] for i in tqdm(range(args.sequences), desc="rendering", unit="sequence", disable=None)]
    seconds = time.perf_counter() - start
    with AtomicFiles() as files:
        Image.fromarray(contact_sheet(samples)).save(files.add(args.out / "preview.png"), format="PNG")
        write_video(files.add(args.out / "preview.mp4"), torch.cat([_beside(sample) for sample in samples]), FPS)
    frames = args.sequences * args.frames
    return f"{frames} frames in {seconds:.1f} s ({frames / seconds:.0f} frames/s); {args.out}/preview.png, {args.out}/preview.mp4"


def contact_sheet(samples: list[Sample]) -> NDArray[np.uint8]:
    """A picture with one row per sequence: four frames, then inverse depth, objects, motion and flow of the first frame."""
    palette = np.array([(40, 40, 40), *(distinct(i) for i in range(64))], np.uint8)
    rows = []
    for sample in samples:
        assert sample.dynamic is not None and sample.object_id is not None
        picked = torch.linspace(0, len(sample.images) - 1, 4).round().long()
        views = [_pixels(image) for image in sample.images[picked]]
        views += [_nearness(sample)[0], palette[sample.object_id[0].numpy() % len(palette)]]
        views.append(np.repeat(sample.dynamic[0].numpy()[..., None], 3, -1).astype(np.uint8) * 255)
        if sample.flow is not None:
            length = sample.flow[0].norm(dim=-1).sqrt()
            views.append(colormap((length / length.max().clamp_min(1e-6)).numpy()))
        rows.append(np.concatenate(views, 1))
    return np.concatenate(rows)


def _beside(sample: Sample) -> torch.Tensor:
    """Frames and their inverse depth side by side, (S, 3, H, 2 W) in [0, 1]."""
    near = torch.from_numpy(_nearness(sample)).permute(0, 3, 1, 2) / 255
    return torch.cat([sample.images, near], -1)


def _nearness(sample: Sample) -> NDArray[np.uint8]:
    """The inverse depth in colours (S, H, W, 3), grey where the depth is not valid."""
    assert sample.depth is not None and sample.valid is not None
    inverse = 1 / sample.depth.clamp_min(1e-6)
    largest = inverse[sample.valid].max() if sample.valid.any() else torch.tensor(1.0)
    return colormap(torch.where(sample.valid, inverse / largest, torch.nan).numpy())


def _pixels(image: torch.Tensor) -> NDArray[np.uint8]:
    return to_uint8(image.permute(1, 2, 0).numpy())
