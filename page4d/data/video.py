"""Videos: list the frames, and decode only those that are needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import av
from PIL import Image

from ..errors import InputError
from .container import frames, list_frames, open_video, orientation, to_picture

if TYPE_CHECKING:
    from torch import Tensor

Select = Callable[[list[float]], list[int]]  # all timestamps -> ascending indices of the frames to keep
Use = Callable[[Image.Image], object]  # is given one picture after the other

log = logging.getLogger(__name__)


def read_video(path: Path, select: Select, begin: Callable[[int], Use], tick: Callable[[], object]) -> tuple[list[int], list[float]]:
    """Decode `path` once. Returns the indices of the selected frames, and their timestamps in seconds from the first frame of the video.

    `begin(count)` returns what the pictures of so many frames are given to, as they are decoded.
    The frames are selected before decoding, from the container's packets. If the decoder yields other frames than these (a truncated file,
    an unusual container), they are selected again from the decoded frames, in a second pass, for which `begin` is called again. `tick` is
    called once for each kept frame of the first pass.

    Raises:
        InputError: the file is not a video, is damaged, or has no frame that can be decoded.
    """
    timestamps, missing = _list(path)
    chosen, listed = select(timestamps), len(timestamps)
    kept, timestamps = decode(path, chosen, begin(len(chosen)), tick)
    if len(kept) < len(chosen) or not chosen:  # all frames were decoded
        if not timestamps:
            raise InputError(f"{str(path)!r} has no frame that can be decoded: the file is empty or damaged, try another copy")
        if len(timestamps) < listed:
            log.warning("%s: only %d of %d frames can be decoded, the file is damaged or cut short", path, len(timestamps), listed)
        revised = select(timestamps)
        if revised != kept:
            kept, timestamps = decode(path, revised, begin(len(revised)), lambda: None, quiet=True)
    if missing:
        log.warning("%s: %s, it is damaged or cut short", path, missing)
    return kept, [timestamps[i] for i in kept]


def _list(path: Path) -> tuple[list[float], str]:
    """Timestamps of all frames in display order, and what the header promises beyond them. Decodes only if the packets have no times."""
    with open_video(path) as (container, stream):
        listing = list_frames(container, stream)
    return (decode(path, [], lambda image: image, lambda: None)[1] if listing.times is None else listing.times), listing.missing


def decode(path: Path, chosen: list[int], use: Use, tick: Callable[[], object], quiet: bool = False) -> tuple[list[int], list[float]]:
    """Give the pictures of the chosen frames to `use`. Returns the indices of those that were there, and the timestamps of all frames up
    to the last chosen one (of all frames if none is chosen).
    """
    kept: list[int] = []
    timestamps: list[float] = []
    wanted = set(chosen)
    first: float | None = None
    with open_video(path) as (container, stream):
        rate = float(stream.average_rate or 0) or 25.0
        for index, frame in enumerate(frames(container, stream, path, quiet)):
            time = index / rate + (first or 0.0) if frame.time is None else frame.time
            first = time if first is None else first
            timestamps.append(time - first)
            if index == 0 and not quiet and not orientation(frame)[1]:
                log.warning("%s: its rotation is no multiple of 90 degrees, the nearest one is taken", path)
            if index in wanted:
                use(to_picture(frame, stream))
                kept.append(index)
                tick()
                if index == chosen[-1]:
                    break
    return kept, timestamps


def write_video(path: str | Path, images: Tensor, fps: int) -> Path:
    """Write images (S, 3, H, W) in [0, 1] as H.264, or as MPEG-4 if FFmpeg has no H.264 encoder. Odd sides lose one row or column."""
    codec, options = ("libx264", {"crf": "20", "preset": "slow"}) if "libx264" in av.codecs_available else ("mpeg4", {"qscale": "4"})
    height, width = (side // 2 * 2 for side in images.shape[-2:])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)  # for type checkers
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for image in images:
            pixels = (image[:, :height, :width].permute(1, 2, 0) * 255).round().clamp(0, 255).byte().cpu().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return Path(path)
