"""Read single files: colour images, 16-bit depth images, and the binary files of MPI Sintel.

Every function raises InputError with the path if a file is missing or damaged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...data.preprocess import to_rgb
from ...errors import InputError

SINTEL_TAG = 202021.25  # the first float of every binary file of MPI Sintel


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise InputError(f"{str(path)!r} is missing: the dataset is incomplete, unpack it again") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises these for damaged files
        raise InputError(f"cannot read the image {str(path)!r} ({error}): copy it again") from error
    return image


def read_image(path: Path) -> Tensor:
    """A colour image as (3, H, W) fp32 in [0, 1]."""
    return torch.from_numpy(np.array(to_rgb(_open(path)))).permute(2, 0, 1).float() / 255


def read_depth_png(path: Path, per_metre: float = 5000.0) -> Tensor:
    """A 16-bit depth image as (H, W) fp32 in metres; 0 where the sensor measured nothing."""
    return torch.from_numpy(np.asarray(_open(path)).astype(np.float32) / per_metre)


def read_images(paths: list[Path]) -> Tensor:
    """Colour images as (S, 3, H, W) fp32 in [0, 1]. All must have the same size."""
    return _same_size([read_image(path) for path in paths], paths[0].parent)


def read_depths_png(paths: list[Path]) -> Tensor:
    """Depth images as (S, H, W) fp32 in metres. All must have the same size."""
    return _same_size([read_depth_png(path) for path in paths], paths[0].parent)


def _same_size(frames: list[Tensor], folder: Path) -> Tensor:
    if len({frame.shape for frame in frames}) > 1:
        raise InputError(f"the images in {str(folder)!r} have different sizes: all images of a sequence must have the same size")
    return torch.stack(frames)


def read_sintel_depth(path: Path) -> Tensor:
    """The depth (H, W) fp32 in a .dpt file: float32 tag, int32 width and height, float32 depths by rows, little-endian."""
    content = _tagged(path)
    width, height = (int(x) for x in np.frombuffer(content, "<i4", 2, 4)) if len(content) >= 12 else (0, 0)
    if width < 1 or height < 1 or len(content) != 12 + 4 * width * height:
        raise InputError(f"{str(path)!r} is cut off: {len(content)} bytes do not hold {height} x {width} depths; copy it again")
    return torch.from_numpy(np.frombuffer(content, "<f4", width * height, 12).reshape(height, width).copy())


def read_sintel_camera(path: Path) -> tuple[Tensor, Tensor]:
    """Intrinsics (3, 3) and camera-from-world extrinsics (3, 4), fp32, in a .cam file: float32 tag, 9 + 12 float64 by rows."""
    content = _tagged(path)
    if len(content) != 4 + 8 * 21:
        raise InputError(f"{str(path)!r} is cut off: {len(content)} bytes instead of {4 + 8 * 21}; copy it again")
    numbers: NDArray[np.float64] = np.frombuffer(content, "<f8", 21, 4).copy()
    return torch.from_numpy(numbers[:9].reshape(3, 3)).float(), torch.from_numpy(numbers[9:].reshape(3, 4)).float()


def _tagged(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): the dataset is incomplete, unpack it again") from error
    if len(content) < 4 or np.frombuffer(content, "<f4", 1)[0] != SINTEL_TAG:
        raise InputError(f"{str(path)!r} is not a file of MPI Sintel: it does not start with the number {SINTEL_TAG}; copy it again")
    return content
