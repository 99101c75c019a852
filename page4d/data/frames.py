"""Frames of a video, of a folder or of image files, sampled and preprocessed for the network."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from .preprocess import Processed, Size, check_size, preprocess, stack

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Frames:
    """S preprocessed frames of H x W pixels, their origin, and the map between their pixels and those of the originals.

    processed = original * scale + offset, in continuous coordinates (the corner of the first pixel is 0).
    """

    images: Tensor  # (S, 3, H, W) fp32 in [0, 1]
    names: list[str]  # unique: the file stem, or frame_000012 with the index in the video
    timestamps: list[float]  # seconds from the start of the video, or the index of an image file
    original_sizes: list[tuple[int, int]]  # (height, width) of each frame, upright
    scale: Tensor  # (S, 2) fp64: x, y
    offset: Tensor  # (S, 2) fp64: x, y

    def __len__(self) -> int:
        return len(self.names)

    def intrinsics_in_original(self, intrinsics: Tensor) -> Tensor:
        """Convert intrinsics (S, 3, 3) from pixels of `images` to pixels of the originals.

        Pixel centres are integers in both, as in `points_to_original`: the centre of the first pixel is (0, 0).
        """
        rows = intrinsics.double()
        scale, offset = self.scale.to(rows.device), self.offset.to(rows.device)
        upper = rows[:, :2] / scale[..., None] + ((0.5 - offset) / scale - 0.5)[..., None] * rows[:, 2:]
        return torch.cat([upper, rows[:, 2:]], 1).to(intrinsics.dtype)

    def points_to_original(self, xy: Tensor) -> Tensor:
        """Convert points (S, N, 2) from pixels of `images` to pixels of the originals. Pixel centres are integers in both."""
        scale, offset = self.scale[:, None].to(xy.device), self.offset[:, None].to(xy.device)
        return ((xy.double() + 0.5 - offset) / scale - 0.5).to(xy.dtype)

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
    inputs: Sequence[str | Path],
    *,
    size: Size | None = None,
    mode: str = "crop",
    max_frames: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    progress: bool = False,
) -> Frames:
    """Read one video, one folder of images (in natural order), or image files in the given order.

    Args:
        inputs: one video, one folder, or image files.
        size: the size of the frames; sides must be multiples of 14. An int W (default 518), or (H, W).
        mode: "crop" or "pad".
            With an int W, "crop" resizes to width W and a height in proportion, rounded to a multiple of 14, and cuts rows beyond W; "pad"
            resizes the longer side to W and pads with white to W x W.
            With (H, W), "crop" resizes until the image covers H x W and cuts it to that about its centre; "pad" resizes until it fits into
            H x W and pads with white.
        stride: keep every stride-th frame.
        fps: keep about this many frames per second of video.
        max_frames: keep at most this many of these frames, evenly spaced, with the first and the last among them.
        progress: show a progress bar.

    Frames that are not kept are neither converted nor stored.

    Raises:
        InputError: an input cannot be read, or an option cannot work. The message is one line.
    """
    size = check_size(size, mode)
    _check_sampling(max_frames, stride, fps)
    paths = _resolve(inputs)

    def select(timestamps: list[float]) -> list[int]:
        return sample(timestamps, max_frames=max_frames, stride=stride, fps=fps)

    def convert(image: Image.Image) -> Processed:
        return preprocess(image, size=size, mode=mode)

    with tqdm(desc="reading frames", unit="frame", disable=None if progress else True) as bar:
        if _is_video(paths):
            from .video import read_video

            processed, indices, timestamps = read_video(paths[0], select, convert, bar.update)
            names = [f"frame_{index:06d}" for index in indices]
        else:
            if fps is not None:
                raise InputError("fps needs a video, as image files have no timestamps: use stride or a frame count")
            indices = select([float(i) for i in range(len(paths))])
            processed, timestamps = [], [float(i) for i in indices]
            for index in indices:
                processed.append(_read_image(paths[index], convert))
                bar.update()
            names = _unique_names([paths[index] for index in indices])
    sizes = [p.original_size for p in processed]
    images, scale, offset = stack(processed)
    return Frames(images, names, timestamps, sizes, scale, offset)


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


def _check_sampling(max_frames: int | None, stride: int | None, fps: float | None) -> None:
    if stride is not None and fps is not None:
        raise InputError("stride and fps exclude each other: give only one of them")
    if stride is not None and stride < 1:
        raise InputError(f"stride must be 1 or more, not {stride}")
    if fps is not None and not 0 < fps < float("inf"):
        raise InputError(f"fps must be a positive number, not {fps:g}")
    if max_frames is not None and max_frames < 1:
        raise InputError(f"the number of frames must be 1 or more, not {max_frames}")


def _resolve(inputs: Sequence[str | Path]) -> list[Path]:
    """The files to read: one video, or images."""
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    paths = [Path(entry).expanduser() for entry in inputs]
    if not paths:
        raise InputError("nothing to read: give a video, a folder of images or image files")
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"{str(path)!r} does not exist: check the path")
        if len(paths) > 1 and path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(f"{str(path)!r} is not an image file: give one video, one folder, or image files only")
    return _list_folder(paths[0]) if len(paths) == 1 and paths[0].is_dir() else paths


def _list_folder(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(f"cannot open the folder {str(folder)!r} ({error.strerror}): check its permissions") from error
    images = [folder / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    if not images:
        known = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise InputError(f"no images in the folder {str(folder)!r}: it should hold files of the types {known}")
    return sorted(images, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key that puts image2 before image10. The name itself breaks ties such as 1 and 01."""
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name


def _is_video(paths: list[Path]) -> bool:
    """Whether the input is a single file without an image suffix. The decoder then decides whether it is a video."""
    return len(paths) == 1 and paths[0].suffix.lower() not in IMAGE_SUFFIXES


def _read_image(path: Path, convert: Callable[[Image.Image], Processed]) -> Processed:
    try:
        with Image.open(path) as image:
            return convert(ImageOps.exif_transpose(image))
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{str(path)!r} is not an image that can be read: remove it or copy it again") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises these for damaged files
        raise InputError(f"cannot read the image {str(path)!r} ({error}): remove it or copy it again") from error


def _unique_names(paths: list[Path]) -> list[str]:
    """File stems, with a number in front if two of them are equal. Output files use these names."""
    stems = [path.stem for path in paths]
    if len({stem.lower() for stem in stems}) == len(stems):
        return stems
    return [f"{i:06d}_{stem}" for i, stem in enumerate(stems)]
