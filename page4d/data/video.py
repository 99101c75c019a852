"""Videos: list the frames, and decode only those that are needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import av
from PIL import Image

from ..errors import InputError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torch import Tensor

T = TypeVar("T")
Select = Callable[[list[float]], list[int]]  # all timestamps -> ascending indices of the frames to keep

log = logging.getLogger(__name__)


def read_video(
    path: Path, select: Select, convert: Callable[[Image.Image], T], tick: Callable[[], object]
) -> tuple[list[T], list[int], list[float]]:
    """Decode `path` once. Returns `convert(image)` of the selected frames, their indices, and timestamps in seconds from the first.

    The frames are selected before decoding, from the container's packets. If the decoder yields other frames than these (a truncated file,
    an unusual container), they are selected again from the decoded frames, in a second pass. `tick` is called once for each kept frame of
    the first pass.

    Raises:
        InputError: the file is not a video, is damaged, or has no frame that can be decoded.
    """
    timestamps = _packet_timestamps(path)
    chosen, promised = select(timestamps), len(timestamps)
    kept, timestamps = _decode(path, chosen, convert, tick)
    if len(kept) < len(chosen) or not chosen:
        if not timestamps:
            raise InputError(f"{str(path)!r} has no frame that can be decoded: the file is empty or damaged, try another copy")
        if len(timestamps) < promised:
            log.warning("%s: only %d of %d frames can be decoded, the file is damaged or cut short", path, len(timestamps), promised)
        revised = select(timestamps)
        if revised != list(kept):
            kept, timestamps = _decode(path, revised, convert, lambda: None)
    return list(kept.values()), list(kept), [timestamps[i] for i in kept]


def _packet_timestamps(path: Path) -> list[float]:
    """Timestamps of all frames in display order, read from packets. Decodes the video only if its packets have no times."""
    with _open(path) as (container, stream):
        times = [(packet.pts, packet.dts) for packet in container.demux(stream) if packet.size and not packet.is_discard]
        for ticks in zip(*times, strict=True):  # presentation times if all packets have them, otherwise decoding times
            known = sorted(t for t in ticks if t is not None)
            if len(known) == len(times):
                base = stream.time_base or 1
                return [float((t - known[0]) * base) for t in known]
    return _decode(path, [], lambda image: image, lambda: None)[1]


def _decode(
    path: Path, chosen: list[int], convert: Callable[[Image.Image], T], tick: Callable[[], object]
) -> tuple[dict[int, T], list[float]]:
    """The chosen frames by index, and the timestamps of all frames up to the last chosen one (of all frames if none is chosen)."""
    kept: dict[int, T] = {}
    timestamps: list[float] = []
    wanted = set(chosen)
    first: float | None = None
    with _open(path) as (container, stream):
        rate = float(stream.average_rate or 0) or 25.0
        for index, frame in enumerate(_frames(container, stream, path)):
            time = index / rate + (first or 0.0) if frame.time is None else frame.time
            first = time if first is None else first
            timestamps.append(time - first)
            if index in wanted:
                kept[index] = convert(upright(frame.to_image(), frame.rotation))
                tick()
                if index == chosen[-1]:
                    break
    return kept, timestamps


def upright(image: Image.Image, rotation: int) -> Image.Image:
    """The image rotated counterclockwise by `rotation` degrees, a multiple of 90. Phones store the sensor's orientation this way."""
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    turn = turns.get(rotation % 360)
    return image if turn is None else image.transpose(turn)


def _frames(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[VideoFrame]:
    """All frames that can be decoded. Damaged packets are skipped, and one warning gives their number."""
    damaged = 0
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:
                damaged += 1
    except av.error.EOFError:
        pass
    finally:
        if damaged:
            log.warning("%s: skipped %d damaged packet(s)", path, damaged)


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream. Every FFmpeg error becomes an InputError."""
    try:
        # An absolute path, because FFmpeg reads 'name:rest' as a protocol.
        with av.open(os.path.abspath(path)) as container:
            if not container.streams.video or container.format.name == "tty":  # "tty" draws text files as terminal screens
                raise InputError(f"{str(path)!r} has no video in it: give a video, a folder of images or image files")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{str(path)!r} is empty (0 bytes): copy or download it again") from error
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {str(path)!r} as a video ({reason}): the file is damaged or of another kind") from error


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
