"""Frames of a video, of a folder or of image files, sampled and preprocessed for the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import floor
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..files import Allocate
from ..prediction import Cameras, EqualByValue
from . import deep
from .images import Page, is_image, pages, read_all, shown_range, stored_orientation, times
from .posed import Posed, about
from .preprocess import Size, Stack, check_size, preprocess
from .sources import Source, resolve


@dataclass(frozen=True, eq=False)
class Frames(EqualByValue):
    """S preprocessed frames of H x W pixels, their origin, and the map between their pixels and those of the originals.

    processed = original * scale + offset, in continuous coordinates (the corner of the first pixel is 0).
    """

    images: Tensor  # (S, 3, H, W) fp32 in [0, 1]
    names: list[str]  # unique: the file stem, or frame_000012 with the index in the video
    timestamps: list[float]  # seconds from the start of the video, or the index of an image file
    original_sizes: list[tuple[int, int]]  # (height, width) of each frame, upright
    scale: Tensor  # (S, 2) fp64: x, y
    offset: Tensor  # (S, 2) fp64: x, y
    pages: Sequence[Page] = ()  # where each frame was read: the index is that of the picture in its file. Empty for frames made in memory
    shown: deep.Range = deep.FULL  # what is black and white, of pictures of more than 8 bits
    known: Cameras | None = None  # the source's own cameras: (S, 3, 4), (S, 3, 3) fp64, in pixels of the originals, upright

    def __len__(self) -> int:
        return len(self.names)

    def frame(self, index: int) -> Frames:
        """One frame, as S = 1. Its images share the memory."""
        part = slice(index, index + 1)
        per_frame = ("images", "names", "timestamps", "original_sizes", "scale", "offset", "pages")
        known = self.known and Cameras(self.known.extrinsics[part], self.known.intrinsics[part])
        return replace(self, known=known, **{name: getattr(self, name)[part] for name in per_frame})

    def intrinsics_in_original(self, intrinsics: Tensor) -> Tensor:
        """Convert intrinsics (S, 3, 3) from pixels of `images` to pixels of the originals.

        Pixel centres are integers in both, as in `points_to_original`: the centre of the first pixel is (0, 0).
        """
        rows = intrinsics.double()
        scale, offset = self.scale.to(rows.device), self.offset.to(rows.device)
        upper = rows[:, :2] / scale[..., None] + ((0.5 - offset) / scale - 0.5)[..., None] * rows[:, 2:]
        return torch.cat([upper, rows[:, 2:]], 1).to(intrinsics.dtype)

    def intrinsics_from_original(self, intrinsics: Tensor, frames: Sequence[int]) -> Tensor:
        """The inverse of `intrinsics_in_original`, for (n, 3, 3) of some frames."""
        rows, scale, offset = intrinsics.double(), self.scale[list(frames)], self.offset[list(frames)]
        upper = (rows[:, :2] + (0.5 - (0.5 - offset) / scale)[..., None] * rows[:, 2:]) * scale[..., None]
        return torch.cat([upper, rows[:, 2:]], 1).to(intrinsics.dtype)

    def points_to_original(self, xy: Tensor) -> Tensor:
        """Convert points (S, N, 2) from pixels of `images` to pixels of the originals. Pixel centres are integers in both."""
        scale, offset = self.scale[:, None].to(xy.device), self.offset[:, None].to(xy.device)
        return ((xy.double() + 0.5 - offset) / scale - 0.5).to(xy.dtype)

    def to_original(self, xy: NDArray[np.float64], frame: int) -> NDArray[np.float64]:
        """`points_to_original` of points (N, 2) of one frame, in numpy."""
        scale, offset = self.scale[frame].cpu().numpy(), self.offset[frame].cpu().numpy()
        return (xy + 0.5 - offset) / scale - 0.5

    def points_from_original(self, xy: Tensor, frame: int = 0) -> Tensor:
        """Convert points (N, 2) from pixels of one original to pixels of that frame of `images`. Pixel centres are integers in both."""
        scale, offset = self.scale[frame].to(xy.device), self.offset[frame].to(xy.device)
        return ((xy.double() + 0.5) * scale + offset - 0.5).to(xy.dtype)

    def inside(self) -> Tensor:
        """(S, H, W) bool: True for pixels that show the original, False for padding."""
        height, width = self.images.shape[-2:]
        original = torch.tensor(self.original_sizes, dtype=torch.float64)
        x = (torch.arange(width, dtype=torch.float64) + 0.5 - self.offset[:, :1]) / self.scale[:, :1]
        y = (torch.arange(height, dtype=torch.float64) + 0.5 - self.offset[:, 1:]) / self.scale[:, 1:]
        in_x, in_y = (x > 0) & (x < original[:, 1:]), (y > 0) & (y < original[:, :1])
        return in_y[:, :, None] & in_x[:, None, :]


def load_frames(
    inputs: Sequence[str | Path] | Source,
    *,
    size: Size | None = None,
    mode: str = "crop",
    max_frames: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    value_range: str = "auto",
    progress: bool = False,
    allocate: Allocate | None = None,
) -> Frames:
    """Read one video, one animation, one folder of images (in natural order), image files in the given order, or images with cameras.

    docs/inputs.md has all rules: which files are read, how they are turned, cropped, padded and stretched, and what is refused.

    Args:
        inputs: one video, one folder, or image files. A pattern such as "photos/*.jpg" stands for the files that match it.
            A COLMAP model or a transforms.json gives its images, and `Frames.known`. Or what `sources.resolve` has found.
        size: the size of the frames; sides must be multiples of 14. An int W (default 518), or (H, W).
        mode: "crop" or "pad".
            With an int W, "crop" resizes to width W and a height in proportion, rounded to a multiple of 14, and cuts rows beyond W; "pad"
            resizes the longer side to W and pads with white to W x W.
            With (H, W), "crop" resizes until the image covers H x W and cuts it to that about its centre; "pad" resizes until it fits into
            H x W and pads with white.
        stride: keep every stride-th frame.
        fps: keep about this many frames per second of video.
        max_frames: keep at most this many of these frames, evenly spaced, with the first and the last among them.
        value_range: for pictures of more than 8 bits. "full": 0 to 65535 is black to white. "auto": likewise, but if the clip uses less
            than half of that range, or other values, then the range that it uses.
        progress: show a progress bar.
        allocate: gives the memory of the images, such as `page4d.files.on_disk`. Default: ordinary memory.

    One frame at a time is decoded, converted and stored. Frames that are not kept are neither converted nor stored.

    Raises:
        InputError: an input cannot be read, or an option cannot work. The message is one line.
    """
    size = check_size(size, mode)
    _check_sampling(max_frames, stride, fps)
    if value_range not in deep.RULES:
        raise InputError(f"unknown value range {value_range!r}: use 'auto' or 'full'")
    source = inputs if isinstance(inputs, Source) else resolve(inputs)
    paths = source.paths

    images, sizes = Stack(0), list[tuple[int, int]]()

    def select(timestamps: list[float]) -> list[int]:
        return sample(timestamps, max_frames=max_frames, stride=stride, fps=fps)

    def begin(count: int) -> Callable[[Image.Image], None]:
        """Pictures of so many frames are to come, again if a video turns out to have others than it says."""
        nonlocal images
        images = Stack(count, allocate)
        sizes.clear()
        return convert

    def convert(image: Image.Image) -> None:
        processed = preprocess(image, size=size, mode=mode)
        images.add(processed)
        sizes.append(processed.original_size)

    with tqdm(desc="reading frames", unit="frame", disable=None if progress else True) as bar:
        if len(paths) == 1 and not is_image(paths[0]):
            from .video import read_video

            indices, timestamps = read_video(paths[0], select, begin, bar.update)
            names = [f"frame_{index:06d}" for index in indices]
            chosen, shown = [Page(paths[0], index) for index in indices], deep.FULL
        else:
            found = [page for path in paths for page in pages(path)[: 1 if source.posed else None]]  # a camera has one picture
            animation = len(paths) == 1 and len(found) > 1
            seconds = times(found) if animation else None
            if fps is not None and seconds is None:
                raise InputError("fps needs a video, as image files have no timestamps: use stride or a frame count")
            indices = select(seconds or [float(i) for i in range(len(found))])
            chosen = [found[index] for index in indices]
            shown = shown_range(chosen, value_range)
            for _ in read_all(chosen, begin(len(chosen)), shown):
                bar.update()
            timestamps = [seconds[i] if seconds else float(i) for i in indices]
            names = [f"frame_{index:06d}" for index in indices] if animation else _unique_names(found, indices)
    known = _known([source.posed[index] for index in indices], chosen, sizes) if source.posed else None
    stacked, scale, offset = images.result()
    return Frames(stacked, names, timestamps, sizes, scale, offset, chosen, shown, known)


def sample(timestamps: list[float], *, max_frames: int | None, stride: int | None, fps: float | None) -> list[int]:
    """Ascending indices of the frames to keep. `timestamps` are ascending, in seconds."""
    chosen = list(range(0, len(timestamps), stride or 1))
    if fps is not None:
        chosen, next_tick = [], 0
        for index, time in enumerate(timestamps):
            ticks = (time - timestamps[0]) * fps + 1e-6  # slack for timestamps that are rounded down to the container's time base
            if ticks >= next_tick:
                chosen.append(index)
                next_tick = floor(ticks) + 1
    if max_frames is None or len(chosen) <= max_frames:
        return chosen
    last = len(chosen) - 1
    return [chosen[round(i * last / max(1, max_frames - 1))] for i in range(max_frames)]


def _known(posed: list[Posed], chosen: list[Page], sizes: list[tuple[int, int]]) -> Cameras:
    """The cameras of the chosen pages, in pixels of the upright pictures of `sizes` (height, width)."""
    found = []
    for camera, page, size in zip(posed, chosen, sizes, strict=True):
        with about(repr(str(page.path))):
            found.append(camera.in_picture(size, stored_orientation(page)))
    extrinsics, intrinsics = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*found, strict=True))
    return Cameras(extrinsics, intrinsics)


def _check_sampling(max_frames: int | None, stride: int | None, fps: float | None) -> None:
    if stride is not None and fps is not None:
        raise InputError("stride and fps exclude each other: give only one of them")
    for name, value in (("stride", stride), ("the number of frames", max_frames)):
        if value is not None and not isinstance(value, Integral):
            raise InputError(f"{name} must be a whole number, not {value!r}")
    if fps is not None and not isinstance(fps, Real):
        raise InputError(f"fps must be a number, not {fps!r}")
    if stride is not None and stride < 1:
        raise InputError(f"stride must be 1 or more, not {stride}")
    if fps is not None and not 0 < fps <= 1e6:
        raise InputError(f"fps must be a positive number, not {fps:g}")
    if max_frames is not None and max_frames < 1:
        raise InputError(f"the number of frames must be 1 or more, not {max_frames}")


def _unique_names(found: list[Page], indices: list[int]) -> list[str]:
    """File stems of the chosen pages, with the page's number behind if the file has several, and a number in front if two are equal.

    Output files use these names.
    """
    several = Counter(page.path for page in found)
    chosen = [found[index] for index in indices]
    stems = [page.path.stem + (f"_{page.index:06d}" if several[page.path] > 1 else "") for page in chosen]
    if len({stem.lower() for stem in stems}) == len(stems):
        return stems
    return [f"{i:06d}_{stem}" for i, stem in enumerate(stems)]
