"""MPI Sintel, final pass: images, depth and cameras of the training set, in the folders that the downloads unpack to."""

from __future__ import annotations

from pathlib import Path

import torch

from ...data.sample import Sample
from ...errors import InputError
from .base import Dataset, Request, Rules, existing_folder, present
from .files import read_images, read_sintel_camera, read_sintel_depth

EXPECTED = (
    "training/final/SEQUENCE/frame_0001.png, training/depth/SEQUENCE/frame_0001.dpt and training/camdata_left/SEQUENCE/frame_0001.cam"
)

# In the other nine the camera is static or moves in a straight line.
POSE_SEQUENCES = (
    "alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4", "market_2", "market_5", "market_6", "shaman_3",
    "sleeping_1", "sleeping_2", "temple_2", "temple_3",
)  # fmt: skip

RULES = Rules(pose_sequences=frozenset(POSE_SEQUENCES), max_depth=70.0, official_clip=70.0, official_skip=frozenset({"market_5"}))


def open_sintel(where: str, request: Request) -> Dataset:
    """All sequences in the folder `where`, or the 14 of the pose protocol if the only task is pose; at most 120 frames, stride 1."""
    training = existing_folder(Path(where).expanduser(), f"MPI Sintel with {EXPECTED}") / "training"
    images = existing_folder(training / "final", f"MPI Sintel with {EXPECTED}")
    wanted = POSE_SEQUENCES if request.tasks == {"pose"} else tuple(sorted(path.name for path in images.iterdir() if path.is_dir()))
    sequences = present(wanted, images, f"MPI Sintel with {EXPECTED}")

    def read(sequence: str) -> Sample:
        files = sorted((images / sequence).glob("frame_*.png"))[: request.frames or 120]
        if not files:
            raise InputError(f"no frames in {str(images / sequence)!r}: expected frame_0001.png and so on")
        cameras = [read_sintel_camera(training / "camdata_left" / sequence / f"{file.stem}.cam") for file in files]
        depth = torch.stack([read_sintel_depth(training / "depth" / sequence / f"{file.stem}.dpt") for file in files])
        valid = depth.isfinite() & (depth > 0)
        return Sample(
            images=read_images(files),
            extrinsics=torch.stack([extrinsics for _, extrinsics in cameras]),
            intrinsics=torch.stack([intrinsics for intrinsics, _ in cameras]),
            depth=depth.where(valid, 0),
            valid=valid,
            name=sequence,
        )

    return Dataset("sintel", sequences, read, RULES)
