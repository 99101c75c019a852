"""A reconstruction in chunks: whether, how long, and where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from page4d_kernels import registries
from page4d_kernels.profiling import peak_bytes

from .. import __version__
from ..data import Frames
from ..errors import InputError
from ..evaluation.pose import pose_metrics
from ..long_video.chunks import Chunk, Chunking
from ..long_video.known import Known, matched
from ..long_video.passes import chosen_chunking
from ..long_video.store import RECORD, Store, recorded
from ..model import Page4D
from ..prediction import Cameras

FOLDER = "chunks"  # of the output folder; it goes when all files are written
OFF = "off"


@dataclass(frozen=True)
class Wish:
    """What the caller asked for, and what an earlier run of the same has left."""

    chunking: Chunking | None
    may_choose: bool  # chunks are taken if one pass does not fit
    record: dict[str, Any] | None  # of the run to go on with

    @classmethod
    def of(cls, chunk: Chunking | int | Sequence[int] | str | None, tracks: bool, folder: Path | None, resume: bool) -> Wish:
        """InputError if the options cannot go together, or if an unfinished run is in the way."""
        chunking = None if chunk is None or chunk == OFF else Chunking.of(chunk)
        if chunking is not None and tracks:
            raise InputError("points are tracked in one pass over all frames: leave out --chunk, or the points")
        if resume and (folder is None or chunk == OFF):
            raise InputError("only a run in chunks with an output folder can be resumed: leave out --resume")
        if folder is None:
            return cls(chunking, not tracks and chunk != OFF, None)
        record = recorded(folder / FOLDER)
        if record is not None and not resume and chunking is not None:
            raise InputError(f"{str(folder / FOLDER)!r} has a run that was not finished: go on with it with --resume, or remove the folder")
        if record is not None and not (isinstance(record.get("chunk"), list) and isinstance(record.get("memory_budget", 0.5), int | None)):
            raise InputError(f"{str(folder / FOLDER / RECORD)!r} is damaged: remove the folder and start without --resume")
        return cls(chunking, not tracks and chunk != OFF, record if resume else None)

    def decide(self, model: Page4D, frames: int, fits: Callable[[int], bool]) -> Chunking | None:
        """The chunks. None: one pass over all frames."""
        chosen = self.chunking
        if chosen is None and self.record is not None:
            chosen = Chunking.of(self.record["chunk"])
        if chosen is None and self.may_choose:
            chosen = chosen_chunking(model.config, frames, fits)
        return chosen if chosen is not None and frames > chosen.size else None


def record(
    weights: str, model: Page4D, frames: Frames, chunking: Chunking, budget: int | None, device: torch.device, options: dict[str, Any]
) -> dict[str, Any]:
    """All that the bits of a chunk depend on, for `Store`."""
    path = Path(weights)
    origins = [[page.path.name, page.index, *_mark(page.path)] for page in frames.pages]
    described = [frames.names, frames.timestamps, frames.scale.tolist(), frames.offset.tolist(), list(frames.images.shape), origins]
    return {
        "page4d": __version__,
        "torch": torch.__version__,
        "weights": [weights, *(_mark(path) if path.is_file() else [])],
        "model": hashlib.sha256(model.config.to_json().encode()).hexdigest(),
        "frames": [len(frames), hashlib.sha256(json.dumps(described).encode()).hexdigest()],
        "chunk": [chunking.size, chunking.overlap],
        "memory_budget": budget,
        "device": device.type,
        "dtype": str(model.aggregator.compute_dtype),
        "backends": {name: registry.requested() for name, registry in registries().items()},
        **options,
    }


def _mark(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


@contextmanager
def frame_bar(frames: int, device: torch.device, progress: bool) -> Iterator[Callable[[Chunk], None]]:
    """A bar over frames, with their rate, the time to go and the peak memory so far. Yields what is called after each chunk."""
    with tqdm(total=frames, desc="chunks", unit="frame", disable=None if progress else True) as bar:

        def advance(chunk: Chunk) -> None:
            bar.set_postfix_str(f"{peak_bytes(device) / 2**30:.2f} GiB", refresh=False)
            bar.update(len(chunk) - chunk.overlap)

        yield advance


def known_cameras(known: Known, frames: Frames) -> tuple[list[int], Cameras]:
    """The frames that have a known camera, and these cameras in pixels of the network's images."""
    which, cameras = matched(known, frames.names, frames.timestamps)
    return which, Cameras(cameras.extrinsics, frames.intrinsics_from_original(cameras.intrinsics, which))


def distance(predicted: Cameras, which: Sequence[int], known: Cameras) -> dict[str, float]:
    """How far predicted cameras (1, S, ...) are from the known ones of some frames: `pose_metrics`, the number of these frames ("frames"),
    and the mean relative error of the focal lengths ("focal", NaN without known intrinsics).
    """
    found = pose_metrics(predicted.extrinsics[0, list(which)], known.extrinsics)
    ratio = _focal(predicted.intrinsics[0, list(which)].double()) / _focal(known.intrinsics)
    off = (ratio - 1).abs()[ratio.isfinite()]
    return {**found, "focal": float(off.mean()) if len(off) else float("nan"), "frames": float(len(which))}


def apart(cameras: Cameras, which: Sequence[int], known: Cameras) -> float:
    """RMS distance of the camera centres of some frames to the known ones, as they are."""
    centres, true = cameras.centers[0, list(which)].double(), Cameras(known.extrinsics[None], known.intrinsics).centers[0]
    return float((centres - true).square().sum(1).mean().sqrt())


@contextmanager
def kept(store: Store, say: Callable[[str], None]) -> Iterator[None]:
    """Say how to go on if the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"the chunks that are done lie in {str(store.folder)!r}: go on with --resume")
        raise


def _focal(intrinsics: Tensor) -> Tensor:
    return (intrinsics[:, 0, 0] + intrinsics[:, 1, 1]) / 2
