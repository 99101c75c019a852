"""A video file: which of its streams is the video, its frames, and each frame as an upright picture of square pixels."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import av.filter
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import Image

from ..errors import InputError
from .orientation import UPRIGHT, of_display_matrix, upright

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

NOT_THE_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]", b"v=0", b"#!IMF")  # their first bytes
ASPECTS = (0.1, 10.0)  # a pixel's width / height; what lies outside is a mistake in the file

log = logging.getLogger(__name__)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream. Every FFmpeg error becomes an InputError."""
    _refuse_playlist(path)
    try:
        # An absolute path, because FFmpeg reads 'name:rest' as a protocol.
        with av.open(os.path.abspath(path), metadata_errors="replace") as container:
            videos = [stream for stream in container.streams.video if not stream.disposition & NOT_THE_VIDEO]
            if not videos or container.format.name == "tty":  # "tty" draws text files as terminal screens
                covers = ", only cover art or thumbnails" if container.streams.video and not videos else ""
                raise InputError(f"{str(path)!r} has no video in it{covers}: give a video, a folder of images or image files")
            known = [stream for stream in videos if stream.codec_context is not None]
            if not known:
                raise InputError(f"the video in {str(path)!r} has a codec that this FFmpeg does not know: convert it to H.264")
            stream = max(known, key=_importance)
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{str(path)!r} is empty (0 bytes): copy or download it again") from error
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {str(path)!r} as a video ({reason}): the file is damaged or of another kind") from error


def _refuse_playlist(path: Path) -> None:
    """FFmpeg follows a playlist to other files, and waits for the next part of one without an end."""
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \r\n\t")
        if start.startswith(PLAYLISTS) or (start.startswith(b"<") and b"<MPD" in start):
            raise InputError(f"{str(path)!r} is a playlist, not a video: give the video itself")


def _importance(stream: VideoStream) -> tuple[bool, bool, int]:
    """What makes a stream the video among several: that it is marked as the default, more than one picture, and the larger picture."""
    return bool(stream.disposition & Disposition.default), stream.frames != 1, (stream.width or 0) * (stream.height or 0)


@dataclass(frozen=True)
class Listing:
    """What a container says about its frames, from its packets and its header."""

    times: list[float] | None  # seconds from the first frame, in display order; None if the packets have no times
    missing: str  # what the header promises and the file does not hold, in words; empty if nothing is missing


def list_frames(container: InputContainer, stream: VideoStream) -> Listing:
    """Read all packets, without decoding."""
    found, discarded = [], 0
    for packet in _packets(container, stream, []):
        if packet.is_discard:
            discarded += 1
        elif packet.size:
            found.append((packet.pts, packet.dts))
    for ticks in zip(*found, strict=True):  # presentation times if all packets have them, otherwise decoding times
        known = sorted(t for t in ticks if t is not None)
        if len(known) == len(found):
            times = [float((t - known[0]) * (stream.time_base or 1)) for t in known]
            return Listing(times, _missing(stream, times, discarded))
    return Listing(None, "")


def _missing(stream: VideoStream, times: list[float], discarded: int) -> str:
    if len(times) < stream.frames - discarded:
        return f"only {len(times)} of {stream.frames - discarded} frames are in the file"
    promised = _seconds(stream.metadata.get("DURATION", ""))  # Matroska has no number of frames
    interval = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    if not stream.frames and times[-1] + 3 * interval < promised:
        return f"the file ends at {times[-1]:.2f} s of {promised:.2f} s"
    intervals = [later - earlier for earlier, later in pairwise(times)]
    usual = sorted(intervals)[len(intervals) // 2] if intervals else 0.0
    steady = sum(abs(interval - usual) < 0.1 * usual for interval in intervals) >= 0.8 * len(intervals)
    lost = sum(round(interval / usual) - 1 for interval in intervals if interval > 2.5 * usual) if steady and usual > 0 else 0
    return f"about {lost} frames are missing within, by its timestamps" if lost else ""


def _seconds(text: str) -> float:
    """Seconds of a time such as 00:01:02.5; 0 if it is none."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
        return 3600 * hours + 60 * minutes + seconds
    except ValueError:
        return 0.0


def frames(container: InputContainer, stream: VideoStream, path: Path, quiet: bool = False) -> Iterator[VideoFrame]:
    """All frames that can be decoded, deinterlaced. What is damaged is counted, and one warning says it at the end."""
    faults: list[str] = []
    damaged = concealed = 0
    deinterlacer = _Deinterlacer(stream)

    def decoded() -> Iterator[VideoFrame]:
        nonlocal damaged
        for packet in _packets(container, stream, faults):
            try:
                yield from packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                damaged += 1
        if faults:  # the end of the file was not reached: what the decoder still holds
            with suppress(av.error.FFmpegError):
                yield from stream.codec_context.decode(None)

    try:
        for frame in decoded():
            concealed += bool(frame.is_corrupt)
            yield from deinterlacer.push(frame)
        yield from deinterlacer.flush()
    finally:
        if damaged:
            faults.append(f"skipped {damaged} damaged packet(s)")
        if concealed:
            faults.append(f"{concealed} frame(s) have damaged parts, which the decoder filled in")
        if faults and not quiet:
            log.warning("%s: %s", path, "; ".join(faults))
        if deinterlacer.active and not quiet:
            log.warning("%s: interlaced video, deinterlaced by FFmpeg's bwdif", path)


def _packets(container: InputContainer, stream: VideoStream, faults: list[str]) -> Iterator[av.Packet]:
    """The packets of the stream up to the end of the file, or up to the first that cannot be read, which is added to `faults`."""
    try:
        yield from container.demux(stream)
    except av.error.EOFError:
        pass
    except av.error.FFmpegError as error:
        faults.append(f"the file cannot be read to its end ({error.strerror})")


class _Deinterlacer:
    """From the first interlaced frame on, frames go through FFmpeg's bwdif filter, which leaves progressive ones as they are."""

    def __init__(self, stream: VideoStream):
        self._stream = stream
        self._graph: av.filter.Graph | None = None
        self._shape: tuple[int, int, str] | None = None

    @property
    def active(self) -> bool:
        return self._graph is not None

    def push(self, frame: VideoFrame) -> Iterator[VideoFrame]:
        if self._graph is None and not frame.interlaced_frame:
            yield frame
            return
        shape = (frame.width, frame.height, frame.format.name)
        if shape != self._shape:
            yield from self.flush()
            self._graph, self._shape = self._build(frame), shape
        yield from self._through(frame)

    def flush(self) -> Iterator[VideoFrame]:
        if self._graph is not None:
            yield from self._through(None)

    def _build(self, frame: VideoFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
            graph.add("bwdif", "mode=send_frame:deint=interlaced"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        return graph

    def _through(self, frame: VideoFrame | None) -> Iterator[VideoFrame]:
        assert self._graph is not None
        self._graph.push(frame)
        while True:
            try:
                found = self._graph.pull()
            except (BlockingIOError, av.error.EOFError):  # it wants the next frame, or has no more
                return
            assert isinstance(found, av.VideoFrame)
            yield found


def to_picture(frame: VideoFrame, stream: VideoStream) -> Image.Image:
    """The frame as it is meant to be seen: upright, with square pixels. Lines keep their number, columns follow the pixel aspect ratio."""
    image = frame.to_image()
    aspect = float(stream.sample_aspect_ratio or 1)
    if aspect != 1 and ASPECTS[0] <= aspect <= ASPECTS[1]:
        image = image.resize((max(1, round(image.width * aspect)), image.height), Image.Resampling.BICUBIC)
    return upright(image, orientation(frame)[0])


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """The EXIF orientation that the frame's display matrix is next to, and whether the matrix is exactly that."""
    data: Any = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]  # the stubs know names alone
    return (UPRIGHT, True) if data is None else of_display_matrix(struct.unpack("=9i", bytes(data)))
