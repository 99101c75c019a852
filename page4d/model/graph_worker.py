"""The child process in which CUDA graphs of the whole model are judged: `page4d qualify` starts it, as it does for each backend.

Graphs must give the bits of the pass that they were captured from, for inputs that they have not seen. Then both are timed.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from page4d_kernels.qualify import worker
from page4d_kernels.qualify.classes import DTYPES, FORWARD, class_of, part
from page4d_kernels.qualify.run import Job
from page4d_kernels.timing import interleaved

from ..config import preset
from .cuda_graph import MAX_FRAMES, GraphedPage4D, PassProblem
from .page4d import Page4D

JOB = Job("cuda_graph", "graph", worker=__spec__.name if __spec__ else __name__)
MODELS = {"page4d-mask": (336, 518), "nano": (56, 84)}  # by preset, the size at which they are used
SECONDS = 1.0
Calls = dict[str, dict[str, Callable[[], Any]]]  # by class: with a graph and without


def models(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Page4D, Callable[[int, int], Tensor]]]:
    """Each model with random weights, and a function that makes (frames, 3, H, W) images from a seed."""
    for name, size in MODELS.items():
        with torch.device(device):
            model = Page4D(preset(name)).eval().set_compute_dtype(dtype)

        def images(frames: int, seed: int, size: tuple[int, int] = size) -> Tensor:
            return torch.rand(frames, 3, *size, generator=torch.Generator().manual_seed(seed)).to(device)

        yield name, model, images


def judge(graphed: GraphedPage4D, images: Callable[[int, int], Tensor], frames: int, seed: int) -> str:
    """Why graphs of so many frames must not be taken; empty if they are equal on three inputs."""
    for i in range(3):
        given = images(frames, seed + i)
        found, expected = graphed(given), graphed.model(given)
        for name, value in expected.tensors().items():
            if not torch.equal(found.tensors()[name], value):
                return f"{frames} frames: {name} of input {i + 1} has other bits than without a graph"
    return ""


def calls(label: str, device: str, dtype: torch.dtype, seed: int, say: Callable[..., None]) -> tuple[str, Calls]:
    """Why graphs must not be taken, and by class the calls to time."""
    found: Calls = {}
    for name, model, images in models(device, dtype):
        graphed = GraphedPage4D(model)
        for frames in (2, MAX_FRAMES):
            say(at=f"{label}, {name}, {frames} frames", part=label)
            given = images(frames, seed)
            found[class_of(PassProblem.of(model, given))] = {
                "graph": functools.partial(graphed, given),
                "eager": functools.partial(model, given),
            }
            if reason := judge(graphed, images, frames, seed):
                return reason, {}
    return "", found


def main() -> None:
    job, say = worker.channel()
    worker.wait(say)
    seed = random.Random(job["seed"]).randrange(1 << 30)
    named = {name: dtype for dtype, name in DTYPES.items()}
    passed: dict[str, Calls] = {}
    with torch.inference_mode():
        for dtype in job["dtypes"]:
            label = part(dtype, FORWARD, "")
            if label in job["judged"] and label not in job["passed"]:
                continue
            try:
                reason, found = calls(label, job["device"], named[dtype], seed, say)
            except torch.OutOfMemoryError as error:
                say(skipped=label, reason=f"no memory ({str(error).splitlines()[0]})")
                continue
            if reason:
                say(failed=label, reason=reason)
                continue
            passed[label] = found
            if label not in job["passed"]:
                say(passed=label, lengths=[])
        deadline = time.monotonic() + float(worker.wait(say))
        for label, found in passed.items():
            left = {name: runs for name, runs in found.items() if name not in job["timed"]}
            for name, runs in left.items():
                if time.monotonic() > deadline:
                    say(untimed=name)
                    continue
                say(at=f"timing, {name}", part=label)
                times = interleaved(runs, job["device"], SECONDS)
                say(timed=name, seconds=[times["graph"].lower, times["eager"].lower])
            if time.monotonic() <= deadline:
                say(complete=label)
    say(done=True)


if __name__ == "__main__":
    main()
