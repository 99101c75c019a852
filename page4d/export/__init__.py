"""Write predictions to files, with one module per format. Every file is written atomically."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.frames import Frames
from ..errors import InputError
from ..files import AtomicFiles, check_writable
from ..prediction import Prediction
from ._manifest import Manifest, marks
from .colmap import write_colmap
from .depth import write_depth
from .extras import need
from .glb import write_glb
from .mask import write_mask
from .nerfstudio import write_nerfstudio
from .npz import write_npz
from .options import DEFAULTS, ExportOptions
from .overview import write_overview
from .ply import write_ply
from .rerun import write_rerun
from .tracks import write_tracks
from .trajectory import write_trajectory
from .views import GEOMETRY, check

__all__ = ["DEFAULT", "FOLDERS", "FORMATS", "ExportOptions", "Format", "available", "check_formats", "expanded", "export", "export_chunks"]


@dataclass(frozen=True)
class Format:
    """One format of the results."""

    write: Callable[[Path, Prediction, Frames, ExportOptions], list[Path]]  # into a folder; returns the files
    needed: tuple[str, ...] = ()  # fields of the prediction
    default: bool = True  # written when no formats are named
    package: str = ""  # that it needs beyond those of page4d
    helped: tuple[str, ...] = ()  # fields that it uses if they are there


FORMATS: dict[str, Format] = {
    "npz": Format(lambda out, prediction, frames, _: write_npz(out / "predictions.npz", prediction, frames)),
    "ply": Format(lambda out, prediction, frames, _: write_ply(out / "points.ply", prediction, frames), GEOMETRY),
    "depth": Format(write_depth, ("depth",)),
    "mask": Format(lambda out, prediction, frames, _: write_mask(out, prediction, frames), ("mask",)),
    "trajectory": Format(lambda out, prediction, frames, _: write_trajectory(out, prediction, frames), ("pose_enc",)),
    "tracks": Format(lambda out, prediction, frames, _: write_tracks(out, prediction, frames), ("track",)),
    "overview": Format(lambda out, prediction, frames, _: write_overview(out / "overview.png", prediction, frames)),
    "glb": Format(write_glb, GEOMETRY, default=False, package="trimesh", helped=("mask",)),
    "colmap": Format(write_colmap, GEOMETRY, default=False, helped=("mask", "track")),
    "nerfstudio": Format(write_nerfstudio, GEOMETRY, default=False, helped=("mask",)),
    "rerun": Format(write_rerun, GEOMETRY, default=False, package="rerun", helped=("mask", "track")),
}

DEFAULT = "default"  # stands for all formats that are written when none are named

CHUNKS = "chunks.json"  # is written for a run in chunks, whatever the formats

FOLDERS = (  # of an output folder, that files are written to
    *("", "depth", "depth/preview", "mask", "mask/raw", "tracks"),
    *("colmap/sparse/0", "colmap/images", "colmap/masks", "nerfstudio", "nerfstudio/images", "nerfstudio/masks", "nerfstudio/depth"),
)


def available(prediction: Prediction) -> list[str]:
    """The formats that are written when none are named: those whose outputs are in this prediction and that need no further package."""
    return expanded([DEFAULT], prediction.tensors())


def expanded(formats: Sequence[str], fields: Collection[str]) -> list[str]:
    """The names of the formats, with "default" replaced by those that are written without being named and whose `fields` are there."""
    usual = [name for name, entry in FORMATS.items() if entry.default and set(entry.needed) <= set(fields)]
    return list(dict.fromkeys(each for name in formats for each in (usual if name == DEFAULT else [name])))


def check_formats(formats: Sequence[str], options: ExportOptions) -> list[str]:
    """The formats without repetitions. InputError if one is unknown, or if a package that it needs is not installed."""
    names = list(dict.fromkeys(formats))
    every_field = {field for entry in FORMATS.values() for field in entry.needed}
    for name in expanded(names, every_field):
        if name not in FORMATS:
            raise InputError(f"unknown format {name!r}: choose from {DEFAULT}, {', '.join(FORMATS)}")
        package = "OpenEXR" if name == "depth" and options.depth_type == "exr" else FORMATS[name].package
        if package:
            need(package, f"{options.depth_type if name == 'depth' else name} files")
    return names


def export(
    prediction: Prediction,
    frames: Frames,
    out_dir: str | Path,
    formats: Sequence[str] | None = None,
    options: ExportOptions = DEFAULTS,
    progress: bool = False,
) -> list[Path]:
    """Write `formats` into `out_dir`, which is created if needed. Returns the paths of the files.

    Files that an earlier export of the same formats left there are removed, see `Manifest`.

    Args:
        prediction: one sequence (B = 1).
        frames: the frames that it was predicted from.
        formats: some of `FORMATS`, docs/formats.md has them all. "default" stands for those of `available`, and so does None.
        options: how they are written.
        progress: show a progress bar.

    Raises:
        InputError: a format is unknown, the prediction lacks an output for it, a package for it is not installed, or the folder cannot be
            written. Then nothing is written. Also if writing fails later: the files of earlier formats stay, and the failed format leaves
            none.
    """
    names = expanded(check_formats([DEFAULT] if formats is None else formats, options), prediction.tensors())
    for name in names:
        try:
            check(prediction, frames, *FORMATS[name].needed)
        except InputError as error:
            raise InputError(f"cannot export {name!r}: {error}") from error
    out_dir = Path(out_dir)
    check_writable(out_dir)
    manifest = Manifest(out_dir)
    written: list[Path] = []
    try:
        for name in tqdm(names, desc="exporting", unit="format", disable=None if progress else True):
            before = marks(out_dir, FOLDERS)
            files = FORMATS[name].write(out_dir, prediction, frames, options)
            manifest.replace(name, files, before)
            written += files
    except OSError as error:
        path = error.filename2 or error.filename or out_dir  # a failed rename has the final path second
        full = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        advice = "rename the picture" if error.errno == errno.ENAMETOOLONG else f"{full}choose another output folder"
        raise InputError(f"cannot write {str(path)!r} ({error.strerror or error}): {advice}") from error
    manifest.report([*names, CHUNKS])
    return written


def export_chunks(out_dir: Path, content: dict[str, Any] | None) -> list[Path]:
    """Write chunks.json, what a run in chunks says about itself. None: it was one pass, and the file of an earlier run goes."""
    manifest = Manifest(out_dir)
    before = marks(out_dir, [""])
    with AtomicFiles() as files:
        if content is not None:
            files.add(out_dir / CHUNKS).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if files.paths or manifest.has(CHUNKS):
        manifest.replace(CHUNKS, files.paths, before)
    return files.paths
