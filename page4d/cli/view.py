"""`page4d view OUT`: look at a reconstruction in the browser, or save it as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.frames import Frames
from ..errors import InputError
from ..export import DEFAULT, FORMATS
from ..export.extras import need
from ..export.folder import load_folder
from ..export.views import GEOMETRY
from ..prediction import Prediction
from ..viewer import Page, ViewOptions, check_html, save_html
from .common import parse_folder, run_command
from .parser import Parser

THREADS = 1  # of torch. A page is many small operations: on a busy machine more threads wait for each other, 15 s instead of 2
FIELDS = ("mask", "track", "vis", "valid")  # what is shown besides the geometry


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(prog, description="Look at a reconstruction over time, in the browser. Ctrl-C ends it. docs/viewer.md says more.")
    parser.add_argument("out", type=parse_folder, metavar="OUT", help="output folder of page4d infer, or a predictions.npz")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the scene as one .html file that needs no Python, and end")
    parser.add_argument("--port", type=int, default=ViewOptions.port, help="the next free one is taken if it is in use (default: 8080)")
    parser.add_argument("--host", default=ViewOptions.host, help="address to serve at; 0.0.0.0 lets others in (default: 127.0.0.1)")
    parser.add_argument("--no-open", action="store_true", help="do not open a browser")
    parser.add_argument(
        "--moving", type=float, default=ViewOptions.moving, help="motion, 0 to 1, above which a point counts as moving (default: 0.5)"
    )
    parser.add_argument(
        "--confidence", type=float, default=ViewOptions.confidence, metavar="P", help="show points from this percentile on (default: 50)"
    )
    parser.add_argument(
        "--points", type=int, default=ViewOptions.points, metavar="N", help="static points that are sent at most (default: 600000)"
    )
    parser.add_argument("--fps", type=float, default=ViewOptions.fps, help="frames per second that are played (default: 10)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = build_parser(prog).parse_args(argv)
    pages: list[Page] = []
    code = run_command(lambda: run(args, pages), save_memory="use fewer frames")
    run_pages(pages, not args.no_open)
    return code


def run(args: argparse.Namespace, pages: list[Page]) -> str:
    """Save the scene, or add its page to `pages`. Returns the report."""
    options = ViewOptions(args.moving, args.confidence, args.fps, args.points, args.host, args.port)
    need("viser", "the viewer and its files")
    if args.save is not None:
        check_html(args.save)
    prediction, frames = load_folder(args.out, FIELDS)
    if args.save is None:
        return open_page(prediction, frames, options, pages)
    torch.set_num_threads(THREADS)
    with Page(prediction, frames, options) as page:
        path = save_html(page, args.save, args.fps)
    return f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser"


def open_page(prediction: Prediction, frames: Frames, options: ViewOptions, pages: list[Page]) -> str:
    """Start a page and add it to `pages`. Returns the line that says where it is."""
    torch.set_num_threads(THREADS)
    pages.append(Page(prediction, frames, options))
    taken = "" if pages[0].address.endswith(f":{options.port}") else f"; port {options.port} is taken"
    return f"the scene is at {pages[0].address} (Ctrl-C ends it{taken})"


def run_pages(pages: list[Page], open_browser: bool = True) -> None:
    """Serve until Ctrl-C. This comes after the report is printed."""
    for page in pages:
        with page:
            page.run(open_browser)


def check_view(formats: Sequence[str] | None) -> None:
    """InputError if `page4d infer --view` could show nothing: viser is missing, or these formats need no depth and no cameras."""
    need("viser", "the viewer and its files")
    if formats is None or {DEFAULT, "npz", "overview"} & set(formats):
        return
    used = {field for name in formats if name != DEFAULT for field in FORMATS[name].needed}
    if not set(GEOMETRY) <= used:
        raise InputError(f"--view needs depth and cameras, which --export {','.join(formats)} does not compute: add npz to it")
