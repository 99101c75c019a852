"""Time and memory of every export format for a long clip: `python -m benchmarks.export_memory --frames 1000 --size 336x518`.

The prediction is made up and lies on disk, as that of a long video does. What is counted is the memory beyond it: pages that belong to
no file (Linux: RssAnon).
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from page4d.cli.common import parse_names, parse_size
from page4d.data import Frames
from page4d.export import FORMATS, export
from page4d.files import on_disk
from page4d.prediction import Prediction

NOT_MADE_UP = "tracks"  # small, and the same code path as the others


def made_up(folder: Path, count: int, height: int, width: int) -> tuple[Prediction, Frames]:
    """A wavy wall with a block that moves across it, seen by a camera that moves to the right."""
    allocate = on_disk(folder)
    images, depth, confidence = (allocate(name, (1, count, *shape, height, width)) for name, shape in (("i", (3,)), ("d", ()), ("c", ())))
    v, u = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    grid = (height // 14, width // 14)
    mask = torch.full((1, count, *grid), 0.4)
    for i in range(count):
        images[0, i] = torch.stack([u, v, (u + v + i / count) % 1])
        depth[0, i] = 2 + u + v + 0.1 * torch.sin(10 * u + i / 20)
        confidence[0, i] = 1 + (u * 7919 * (i + 1) % 1)
        mask[0, i, grid[0] // 3 : grid[0] // 2 + 1, i % grid[1] :][..., :6] = -0.4
    pose = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0.8, 1.1]).repeat(1, count, 1)
    pose[..., 0] = torch.arange(count) * 0.01
    same = torch.ones(count, 2, dtype=torch.float64), torch.zeros(count, 2, dtype=torch.float64)
    names, times = [f"frame_{i:06d}" for i in range(count)], [i / 30 for i in range(count)]
    prediction = Prediction(images=images, mask=mask, pose_enc=pose, depth=depth[..., None], depth_conf=confidence)
    return prediction, Frames(images[0], names, times, [(height, width)] * count, *same)


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most anonymous memory during the block beyond that at its start, in bytes, as the only number of the list afterwards."""
    start, most, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Print a table of seconds and memory. Returns bytes by format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--size", type=parse_size, default=(336, 518), metavar="HEIGHTxWIDTH")
    parser.add_argument("--formats", type=parse_names, default=[name for name in FORMATS if name != NOT_MADE_UP])
    args = parser.parse_args(argv)
    found = {}
    print("| format | seconds | MiB beyond the prediction |\n|---|---|---|")
    for name in args.formats:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            prediction, frames = made_up(Path(folder), args.frames, *args.size)
            start = time.perf_counter()
            with peak() as most:
                export(prediction, frames, Path(folder) / "out", [name])
            found[name] = most[0]
            print(f"| `{name}` | {time.perf_counter() - start:.0f} | {most[0] / 2**20:.0f} |", flush=True)
    return found


if __name__ == "__main__":
    main()
