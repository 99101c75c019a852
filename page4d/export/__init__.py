"""Write predictions to files, with one module per format. Every file is written atomically."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..data.frames import Frames
from ..errors import InputError
from ..files import check_writable
from ..prediction import Prediction
from ._manifest import Manifest
from ._views import check
from .depth import write_depth
from .mask import write_mask
from .npz import write_npz
from .overview import write_overview
from .ply import write_ply
from .tracks import write_tracks
from .trajectory import write_trajectory

__all__ = ["EXPORTERS", "FOLDERS", "NEEDED", "available", "export"]

Exporter = Callable[[Prediction, Frames, Path], list[Path]]

EXPORTERS: dict[str, Exporter] = {
    "npz": lambda prediction, frames, out_dir: write_npz(out_dir / "predictions.npz", prediction, frames),
    "ply": lambda prediction, frames, out_dir: write_ply(out_dir / "points.ply", prediction, frames),
    "depth": lambda prediction, frames, out_dir: write_depth(out_dir, prediction, frames),
    "mask": lambda prediction, frames, out_dir: write_mask(out_dir, prediction, frames),
    "trajectory": lambda prediction, frames, out_dir: write_trajectory(out_dir, prediction, frames),
    "tracks": lambda prediction, frames, out_dir: write_tracks(out_dir, prediction, frames),
    "overview": lambda prediction, frames, out_dir: write_overview(out_dir / "overview.png", prediction, frames),
}

NEEDED: dict[str, tuple[str, ...]] = {  # fields of the prediction that a format requires
    "npz": (),
    "ply": ("depth", "depth_conf", "pose_enc"),
    "depth": ("depth",),
    "mask": ("mask",),
    "trajectory": ("pose_enc",),
    "tracks": ("track",),
    "overview": (),
}


FOLDERS = ("", "depth", "depth/preview", "mask", "mask/raw", "tracks")  # of an output folder, that files are written to


def available(prediction: Prediction) -> list[str]:
    """The formats whose required outputs are in this prediction."""
    return [name for name, needed in NEEDED.items() if all(getattr(prediction, field) is not None for field in needed)]


def export(
    prediction: Prediction, frames: Frames, out_dir: str | Path, formats: Sequence[str] | None = None, progress: bool = False
) -> list[Path]:
    """Write `formats` into `out_dir`, which is created if needed. Returns the paths of the files.

    Files that an earlier export of the same formats left there are removed, see `Manifest`.

    Args:
        prediction: one sequence (B = 1).
        frames: the frames that it was predicted from.
        formats: some of `EXPORTERS`. None = all that the prediction has outputs for.
        progress: show a progress bar.

    Raises:
        InputError: a format is unknown, the prediction lacks an output for it, or the folder cannot be written. Then nothing is written.
            Also if writing fails later: the files of earlier formats stay, and the failed format leaves none.
    """
    names = available(prediction) if formats is None else list(dict.fromkeys(formats))
    for name in names:
        if name not in EXPORTERS:
            raise InputError(f"unknown export format {name!r}: choose from {', '.join(EXPORTERS)}")
        try:
            check(prediction, frames, *NEEDED[name])
        except InputError as error:
            raise InputError(f"cannot export {name!r}: {error}") from error
    out_dir = Path(out_dir)
    check_writable(out_dir)
    manifest = Manifest(out_dir)
    written: list[Path] = []
    try:
        for name in tqdm(names, desc="exporting", unit="format", disable=None if progress else True):
            files = EXPORTERS[name](prediction, frames, out_dir)
            manifest.replace(name, files)
            written += files
    except OSError as error:
        path = error.filename2 or error.filename or out_dir  # a failed rename has the final path second
        raise InputError(f"cannot write {str(path)!r} ({error.strerror or error}): choose another output folder") from error
    manifest.report(names)
    return written
